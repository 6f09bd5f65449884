"""The result of a run: the trained pipeline on disk, its model card, and the upload to the hub."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub import HfApi, ModelCard, ModelCardData

from sharpening.errors import UserError
from sharpening.files import MODEL_MARKERS, heed_umask
from sharpening.model_source import Source


def save_pipeline(
    source: Source, unet: UNet2DConditionModel, vae: AutoencoderKL | None, prediction_type: str | None, folder: Path
) -> None:
    """Write the pipeline of `source` with another UNet and, where given, another VAE and prediction type."""
    options: dict[str, Any] = {"unet": unet, "dtype": torch.float32}
    if vae is not None:
        options["vae"] = vae
    pipeline = source.load(StableDiffusionXLPipeline, **options)
    if prediction_type is not None:
        # Whoever samples must read the output as what it was trained to be.
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    pipeline.save_pretrained(folder)


@contextmanager
def result_aside(output_dir: Path) -> Iterator[Path]:
    """A folder in which to write a result, which replaces the one in `output_dir` when the block ends well.

    Raises:
        OSError: it cannot be put into place; what was half-written is gone.
    """
    partial = output_dir / ".result.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        heed_umask(partial)
        _replace_result(partial, output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_result(partial: Path, output_dir: Path) -> None:
    """Move the files of a finished result into place, the one that makes the folder what it is last."""
    for marker in MODEL_MARKERS:
        (output_dir / marker).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name in MODEL_MARKERS):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)


def model_card(
    name: str, base: str, about: str, tag: str, settings: Mapping[str, Any], last: Mapping[str, float]
) -> ModelCard:
    """The README.md of the result: hub metadata, how to load it, the settings and the last metrics of the run.

    name is what the result is loaded by, base the model it was made from, about what was done to it.
    """
    lora, prediction_type = settings["use_lora"], settings["prediction_type"]
    load = f'pipe = StableDiffusionXLPipeline.from_pretrained("{base if lora else name}")\n'
    if lora:
        load += f'pipe.load_lora_weights("{name}")\n'
        if prediction_type is not None:
            changed = f'pipe.scheduler.config, prediction_type="{prediction_type}"'
            load += f"pipe.scheduler = pipe.scheduler.from_config({changed})\n"
    data = ModelCardData(
        # The hub refuses a base_model that is not a repository name.
        base_model=None if Path(base).exists() else base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["stable-diffusion-xl", "text-to-image", tag, *(["lora"] if lora else [])],
    )
    rows = {name: value for name, value in sorted(settings.items()) if value not in (None, False)}
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {Path(name).name}\n\n"
        f"`{base}` fine-tuned for {about}.\n\n"
        f"```python\nfrom diffusers import StableDiffusionXLPipeline\n\n{load}```\n\n"
        + _table("Last metrics", ("metric", "value"), {name: f"{last[name]:.6g}" for name in sorted(last)})
        + _table("Settings", ("flag", "value"), {f"`{name}`": f"`{value}`" for name, value in rows.items()})
    )


def _table(title: str, header: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"## {title}\n", f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n\n"


def push_to_hub(output_dir: Path, repository: str, token: str | None, logging_dir: str) -> None:
    """Upload the trained pipeline and its model card, without checkpoints, logs and images.

    Raises:
        UserError: the hub refused; the pipeline on disk is complete.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repository, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo_id,
            folder_path=str(output_dir),
            ignore_patterns=["checkpoint-*", ".checkpoint-*", f"{logging_dir}/*", "images/*", "metrics.jsonl"],
        )
    except Exception as error:
        raise UserError(
            f"--push_to_hub failed ({type(error).__name__}); the pipeline is complete in {output_dir}, check "
            "--hub_token and --hub_model_id and upload it with `hf upload`"
        ) from error
