"""Files and folders of reward models, local or on the hub, and what is wrong when they cannot be had."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from sharpening.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def name_and_path(entry: str) -> tuple[str, str]:
    """`NAME=PATH` as both, or a path alone, with an empty name: a path may hold = itself, a name no slash."""
    name, separator, path = entry.partition("=")
    return (name, path) if separator and "/" not in name else ("", entry)


def find_checkpoint(flag: str, name: str, filename: str, cache_dir: str | None) -> Path:
    """The file that `name` means: a local file, `filename` in a local folder, or on the hub.

    On the hub `owner/repository` means its `filename`, `owner/repository/another_file` another file of it.

    Args:
        flag: what the user wrote, such as `--reward_model image_reward:NAME`, for the message.
        name: local path or hub id.
        filename: the file's published name.
        cache_dir: where downloads are kept; None is the hub library's own choice.

    Raises:
        UserError: naming `flag`, if there is no such file or it cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / filename).is_file():
            return path / filename
        raise UserError(f"{flag}: the folder {name} holds no {filename}; give the path of the checkpoint itself")
    owner, _, rest = name.partition("/")
    repository, _, inside = rest.partition("/")
    if not repository or name.startswith((".", "/", "~")):
        raise UserError(f"{flag}: there is no file {name}; give a checkpoint's path, or a hub id owner/repository")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{repository}", inside or filename, cache_dir=cache_dir))
    except Exception as error:
        raise UserError(
            f"{flag}: {inside or filename} of {owner}/{repository} could not be had from the hub "
            f"({first_line(error)}); check the name and the connection, or download it elsewhere and give its path"
        ) from error


def find_pretrained(flag: str, name: str, kinds: Collection[str], what: str, network: str) -> str:
    """What `from_pretrained` takes for a folder or hub id, its home folder expanded; nothing is loaded or downloaded.

    Args:
        flag: what the user wrote, for the message.
        name: local folder or hub id.
        kinds: the `model_type` that a folder's config.json may have.
        what: such a model, as "a BLIP".
        network: the class of transformers that it is saved from.

    Raises:
        UserError: naming `flag`, if `name` is plainly neither a hub id nor a folder of such a model.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"{flag}: there is no folder {name}; give a folder's path, or a hub id owner/repository")
        return name
    try:
        kind = json.loads((path / "config.json").read_text())["model_type"]
    except (OSError, ValueError, LookupError, TypeError):
        kind = None
    if kind not in kinds:
        raise UserError(
            f"{flag}: the folder {name} holds no config.json of {what}; give one that transformers' {network} was "
            "saved to"
        )
    return str(path)


def list_checkpoints(flag: str, folder: str, cache_dir: str | None) -> dict[str, str]:
    """The checkpoints in a folder and below it: their paths inside it, and each as `find_checkpoint` takes it.

    Args:
        flag: what the user wrote, for the message.
        folder: local, or `owner/repository[/folder]` on the hub. Where the hub is out of reach, only what was
            downloaded before is there.
        cache_dir: where downloads are kept; None is the hub library's own choice.

    Raises:
        UserError: naming `flag`, if there is no such folder or the hub cannot be asked.
    """
    path = Path(folder).expanduser()
    if path.is_dir():
        return {name: str(path / name) for name in _checkpoints_below(path)}
    owner, _, rest = folder.partition("/")
    repository, _, inside = rest.strip("/").partition("/")
    if not repository or folder.startswith((".", "/", "~")):
        raise UserError(f"{flag}: there is no folder {folder}; give a path, or a hub id owner/repository/folder")
    from huggingface_hub import HfApi, snapshot_download

    repository = f"{owner}/{repository}"
    try:
        files = [name for name in HfApi().list_repo_files(repository) if name.endswith(SUFFIXES)]
    except Exception as error:
        try:
            files = _checkpoints_below(Path(snapshot_download(repository, cache_dir=cache_dir, local_files_only=True)))
            logger.warning(f"{flag}: the hub cannot be asked ({first_line(error)}); earlier downloads are used")
        except Exception:
            raise UserError(
                f"{flag}: the files of {repository} could not be listed ({first_line(error)}); check the name and the "
                "connection, or download them elsewhere and give their folder"
            ) from error
    inside = f"{inside}/" if inside else ""
    return {name.removeprefix(inside): f"{repository}/{name}" for name in files if name.startswith(inside)}


def _checkpoints_below(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def read_state_dict(flag: str, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint (.pt, .pth, .bin or .safetensors), without executing anything it may hold.

    A checkpoint that keeps them under `state_dict` or `model`, beside its optimizer, is unwrapped.

    Raises:
        UserError: naming `flag` and the file.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{flag}: {path} is not a checkpoint ({first_line(error)}); download it again") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{flag}: {path} holds no state dict; give the weights alone, as torch.save(state_dict)")
    return content
