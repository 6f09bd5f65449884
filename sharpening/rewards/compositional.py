"""IterComp's reward models: of attributes, of spatial and of non-spatial relations, in a weighted sum."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sharpening.errors import UserError
from sharpening.flags import Flag
from sharpening.rewards.checkpoint_files import SUFFIXES, list_checkpoints, name_and_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PUBLISHED = "comin/IterComp/reward_models"
NAMES = ("attribute", "spatial", "non_spatial")  # of its models, in the order of `--compositional_weights`
FLAGS = (
    Flag(
        "compositional_models",
        f"checkpoints of the compositional reward, or a folder of the three; unset: {PUBLISHED}",
        metavar="NAME=PATH,...",
    ),
    Flag(
        "compositional_weights",
        "their weights, in the same order, of a folder attribute, spatial, non-spatial; unset: 1",
        metavar="W,...",
    ),
)


class CompositionalReward:
    """A weighted sum of IterComp's reward models (Zhang et al. 2024, arXiv 2410.07171), each one logged on its own.

    Range: that of ImageReward, whose architecture they share, times the weights. By default the three models that
    their authors published: of attribute binding, of spatial and of non-spatial relations.

    Args:
        models: `--compositional_models`, one of

            - a folder, local or on the hub as `owner/repository/folder`: the three checkpoints in it or below it,
              told apart by `attribute` (or `binding`), `spatial` and `non-spatial` in their paths, in any spelling;
            - one checkpoint: a path or hub id that ends as a checkpoint does;
            - `attribute=PATH,spatial=PATH,non_spatial=PATH`: any names, each with a path or hub id as
              ImageRewardReward takes it.
        weights: as many numbers, `1,0.5,1` (`--compositional_weights`), for a folder in the order attribute, spatial,
            non-spatial; None is 1 each.
        model: a folder or one checkpoint, `compositional:PATH` in the spec; wins over `models`.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if the models of a folder cannot be told apart, or one cannot be had or does not
            fit.
    """

    def __init__(
        self,
        model: str | None = None,
        models: str | None = None,
        weights: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        self.weights, paths = parse_compositional(model or models, weights)
        if is_folder(paths.get("", "")):
            flag = f"--compositional_models {paths['']}" if models and not model else "--reward_model compositional"
            paths = find_models(flag, paths[""], cache_dir)
        from sharpening.rewards.image_reward_network import ImageRewardScorer

        self.scorers = {
            name: ImageRewardScorer(f"--compositional_models {name or path}", path, device, dtype, cache_dir)
            for name, path in paths.items()
        }

    def get_reward(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        parts = {name: scorer.score(images, prompts) for name, scorer in self.scorers.items()}
        total = sum(weight * part for weight, part in zip(self.weights, parts.values(), strict=True))
        return total, parts if len(parts) > 1 else {}


def parse_compositional(models: str | None, weights: str | None) -> tuple[list[float], dict[str, str]]:
    """The weights, and the paths by name, of CompositionalReward's flags; a folder or a path alone has an empty name.

    Raises:
        UserError: naming the flag, if names, paths and weights do not go together.
    """
    models = models or PUBLISHED
    entries = [models] if Path(models).expanduser().is_dir() else models.split(",")
    pairs = [name_and_path(entry.strip()) for entry in entries]
    paths = dict(pairs)
    if not all(paths.values()) or len(paths) != len(pairs) or (len(pairs) > 1 and "" in paths):
        raise UserError(
            f"--compositional_models {models} must be distinct names with paths, such as attribute=a.pt,spatial=b.pt"
        )
    count = len(NAMES) if is_folder(paths.get("", "")) else len(paths)
    try:
        factors = [float(weight) for weight in weights.split(",")] if weights else [1.0] * count
    except ValueError:
        factors = []
    if len(factors) != count or not all(map(math.isfinite, factors)):
        raise UserError(f"--compositional_weights {weights} must be {count} numbers, one for each of {models}")
    return factors, paths


def is_folder(path: str) -> bool:
    """Whether a path or hub id means a folder of checkpoints rather than one of them."""
    return bool(path) and not path.endswith(SUFFIXES) and not Path(path).expanduser().is_file()


def find_models(flag: str, folder: str, cache_dir: str | None) -> dict[str, str]:
    """The checkpoints of `NAMES` in a folder, by name, each as `checkpoint_files.find_checkpoint` takes it.

    Raises:
        UserError: naming `flag`, if the folder cannot be listed, or does not hold exactly one that is called so for
            each; naming what it holds and `--compositional_models`.
    """
    files = list_checkpoints(flag, folder, cache_dir)
    found = {name: [path for path in files if name in _kinds(path)] for name in NAMES}
    if any(len(paths) != 1 for paths in found.values()):
        listed = ", ".join([*files][:12]) + (f" and {len(files) - 12} more" if len(files) > 12 else "")
        raise UserError(
            f"{flag}: of the checkpoints in {folder} ({listed or 'there is none'}), not exactly one each says "
            "attribute, spatial and non-spatial in its name; name them with "
            "--compositional_models attribute=PATH,spatial=PATH,non_spatial=PATH"
        )
    return {name: files[paths[0]] for name, paths in found.items()}


def _kinds(path: str) -> set[str]:
    """Those of `NAMES` that a path spells out, in whatever way."""
    letters = re.sub("[^a-z]", "", path.lower())
    kinds = {"attribute"} if "attr" in letters or "binding" in letters else set()
    if "nonspatial" in letters:
        kinds.add("non_spatial")
    if "spatial" in letters.replace("nonspatial", ""):
        kinds.add("spatial")
    return kinds
