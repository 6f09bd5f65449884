"""The judge of the captioned-shapes world, a reward without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class ShapesReward:
    """The captioned-shapes world's own judge: the mean of right colour, right shape and right background.

    Range: [0, 1]. Prompts must be captions of that world, such as "a red circle on a white background"; any other is
    an error. Needs no weights. Source: `tiny_world/shapes.py`.
    """

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        import torch

        from tiny_world import shapes

        return torch.from_numpy(shapes.score(images.permute(0, 2, 3, 1).cpu().numpy(), prompts))
