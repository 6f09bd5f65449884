"""Where the weights of a model come from: a hub id or a local folder, and which files of it. No heavy imports."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from sharpening.errors import UserError
from sharpening.files import looks_local

WEIGHTS_NAME = "diffusion_pytorch_model"
LORA_LAYERS = ("to_k", "to_q", "to_v", "to_out.0")  # of every attention of the UNet, which `--use_lora` adapts


@dataclass(frozen=True)
class Source:
    """Where the weights of a pipeline or of a single model come from; `name` is a hub id or a local folder."""

    flag: str
    name: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None

    def load(self, model_class: type, subfolder: str | None = None, **options: Any) -> Any:
        """`model_class.from_pretrained`, its failures in one sentence.

        Raises:
            UserError: the files are missing, damaged or out of reach.
        """
        optional = {"subfolder": subfolder, "variant": self.variant if "dtype" in options else None}
        options |= {name: value for name, value in optional.items() if value is not None}
        from sharpening.progress import underway

        try:
            with underway(f"loading {subfolder or self.name}") if "dtype" in options else nullcontext():
                loaded = model_class.from_pretrained(
                    self.name, revision=self.revision, cache_dir=self.cache_dir, **options
                )
            if getattr(loaded, "vocab_size", 10) < 10:
                # transformers makes an empty tokenizer, without a word, when it finds no files or no connection.
                raise OSError("it has no vocabulary")
            return loaded
        except (OSError, ValueError, RuntimeError) as error:
            part = f"{self.name}/{subfolder}" if subfolder else self.name
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--{self.flag}: {model_class.__name__} could not be loaded from {part} ({type(error).__name__}: "
                f"{reason}); check the name, the files and --variant, or download them first"
            ) from error

    def shapes(self, subfolder: str) -> dict[str, tuple[int, ...]]:
        """The shapes of a model's weights by name, from the headers of its safetensors; none if they are not here."""
        stem = f"{subfolder}/{WEIGHTS_NAME}"
        variants = [f".{self.variant}", ""] if self.variant else [""]
        for variant in variants:
            try:
                index = self._here(f"{stem}.safetensors.index{variant}.json")
                names = {f"{stem}{variant}.safetensors"}
                if index is not None:
                    names = {f"{subfolder}/{name}" for name in json.loads(index.read_text())["weight_map"].values()}
                files = [self._here(name) for name in sorted(names)]
                if all(files):
                    return {name: shape for file in files for name, shape in _header(file)}
            except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
                pass  # damaged: who loads it will say so
        return {}

    def _here(self, path: str) -> Path | None:
        """A file of the source, if it is on this machine."""
        if looks_local(self.name):
            file = Path(self.name).expanduser() / path
            return file if file.is_file() else None
        file = try_to_load_from_cache(self.name, path, revision=self.revision, cache_dir=self.cache_dir)
        return Path(file) if isinstance(file, str) else None

    def read_json(self, path: str) -> dict[str, Any]:
        """A config file of the pipeline, e.g. `unet/config.json`, fetched without any weights."""
        try:
            if looks_local(self.name):
                file = Path(self.name).expanduser() / path
            else:
                file = Path(hf_hub_download(self.name, path, revision=self.revision, cache_dir=self.cache_dir))
            return json.loads(file.read_text())
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--{self.flag}: {path} of {self.name} could not be read ({type(error).__name__}: {reason}); "
                "check the name, or download the model first"
            ) from error

    def identity(self, *subfolders: str) -> str:
        """What names these weights in a cache key: a folder by its files' sizes and times, a hub id by revision."""
        if not looks_local(self.name):
            return f"{self.name}@{self.revision or 'main'}:{self.variant}"
        root = Path(self.name).expanduser().resolve()
        files = sorted(file for part in subfolders or (".",) for file in (root / part).glob("*") if file.is_file())
        stamps = [f"{file.relative_to(root)}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]
        return f"{root}:{self.variant}:{stamps}"


def _header(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors in a safetensors file."""
    with safe_open(file, "np") as tensors:
        return [(name, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()]  # noqa: SIM118


def text_identity(pipeline: Source) -> str:
    """What names the text encoders in a cache key."""
    return pipeline.identity("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
