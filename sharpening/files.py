"""Files and folders: what a name means, what makes a folder a model, and how to write one whole or not at all."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sharpening.errors import require

LORA_FILE = "pytorch_lora_weights.safetensors"
MODEL_MARKERS = ("model_index.json", LORA_FILE)  # what makes a folder a pipeline, or a LoRA adapter, for diffusers too


def looks_local(name: str) -> bool:
    """Whether a model or dataset name can only be a path: hub ids are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def check_writable(flag: str, folder: Path) -> None:
    """Refuse a folder into which no file can be written; it need not exist yet.

    Raises:
        UserError: naming `--flag`.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    require(
        nearest.is_dir() and os.access(nearest, os.W_OK),
        f"--{flag} {folder} cannot be written, because {nearest} is not a writable folder; choose another",
    )


@contextmanager
def write_aside(path: Path, shared: bool = False) -> Iterator[Path]:
    """A name beside `path`, hidden and ending in `.partial`, under which to make a file or a folder.

    What is there when the block ends well is renamed to `path`, whose folder is made if it is missing; if the block
    raises, it is removed. It replaces a file or an empty folder. What a killed process left goes with the next
    `write_aside` of the same path.

    Args:
        path: where the file or the folder is to be.
        shared: several processes or threads may write `path` at once. Each then has a name of its own, and the last
            one wins; what a killed process left stays.

    Raises:
        OSError: it cannot be written, nothing was made, or `path` is a folder that holds something.
    """
    writer = f".{os.getpid()}-{threading.get_ident()}" if shared else ""
    aside = path.with_name(f".{path.name}{writer}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(aside)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        _remove(aside)


def heed_umask(folder: Path) -> None:
    """Let whoever may read new files read the safetensors under `folder`: that library keeps them to their owner.

    Raises:
        OSError: the folder or a file in it cannot be changed.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
