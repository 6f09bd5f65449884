"""IterComp's reward models: of attributes, of spatial and of non-spatial relations, in a weighted sum."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sharpening.errors import UserError
from sharpening.flags import Flag
from sharpening.rewards.checkpoint_files import name_and_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLAGS = (
    Flag("compositional_models", "checkpoints of the compositional reward, or one path", metavar="NAME=PATH,..."),
    Flag("compositional_weights", "their weights, in the same order; unset: 1", metavar="W,..."),
)


class CompositionalReward:
    """A weighted sum of IterComp's reward models (Zhang et al. 2024, arXiv 2410.07171), each one logged on its own.

    Range: that of ImageReward, whose architecture they share, times the weights. Their authors published the training
    of these models and not the weights, so there is no default: train them with IterComp's scripts.

    Args:
        models: `attribute=PATH,spatial=PATH,non_spatial=PATH` (`--compositional_models`): any names, each with a path
            or hub id as ImageRewardReward takes it; or one path alone.
        weights: as many numbers, `1,0.5,1` (`--compositional_weights`); None is 1 each.
        model: one path alone, `compositional:PATH` in the spec; wins over `models`.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if no model is named or one cannot be had or does not fit.
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
    """The weights, and the paths by name, of CompositionalReward's flags; the name of a path alone is empty.

    Raises:
        UserError: naming the flag, if there is no model, or names, paths and weights do not go together.
    """
    if not models:
        raise UserError(
            "--reward_model compositional has no published weights to fall back on; name your checkpoints with "
            "--compositional_models attribute=PATH,spatial=PATH,non_spatial=PATH, or one as compositional:PATH"
        )
    pairs = [name_and_path(entry.strip()) for entry in models.split(",")]
    paths = dict(pairs)
    if not all(paths.values()) or len(paths) != len(pairs) or (len(pairs) > 1 and "" in paths):
        raise UserError(
            f"--compositional_models {models} must be distinct names with paths, such as attribute=a.pt,spatial=b.pt"
        )
    try:
        factors = [float(weight) for weight in weights.split(",")] if weights else [1.0] * len(paths)
    except ValueError:
        factors = []
    if len(factors) != len(paths) or not all(map(math.isfinite, factors)):
        raise UserError(f"--compositional_weights {weights} must be {len(paths)} numbers, one for each of {models}")
    return factors, paths
