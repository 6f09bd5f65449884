"""Metrics of the study: the three parts of the reward that is trained on, likeness to drawings, which is not, and the
match with templates, which is not in the world of signs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from tiny_world import shapes, signs

if TYPE_CHECKING:
    from torch import Tensor


def _part(images: Tensor, prompts: list[str], name: str) -> Tensor:
    import torch

    return torch.from_numpy(shapes.score_parts(images.permute(0, 2, 3, 1).cpu().numpy(), prompts)[name])


def colour(images: Tensor, prompts: list[str]) -> Tensor:
    """Right colour, (B,) in [0, 1]; images (B, 3, H, W) in [0, 1]."""
    return _part(images, prompts, "colour")


def shape(images: Tensor, prompts: list[str]) -> Tensor:
    """Right shape, (B,) in [0, 1]; images (B, 3, H, W) in [0, 1]."""
    return _part(images, prompts, "shape")


def background(images: Tensor, prompts: list[str]) -> Tensor:
    """Right background, (B,) in [0, 1]; images (B, 3, H, W) in [0, 1]."""
    return _part(images, prompts, "background")


@cache
def _drawings(prompt: str, size: int, count: int = 1000) -> np.ndarray:
    """Real drawings of a prompt, (count, H * W * 3) in [0, 1]."""
    rng = np.random.default_rng(0)
    drawn = [np.asarray(shapes.draw(prompt, rng, size), dtype=np.float32).reshape(-1) / 255 for _ in range(count)]
    return np.stack(drawn)


def likeness(images: Tensor, prompts: list[str]) -> Tensor:
    """Minus the root mean square distance to the nearest of 1,000 real drawings of the prompt, (B,) in [-1, 0].

    Shares nothing with the reward but the prompt: an image that games the reward is like no drawing.
    """
    import torch

    flat = images.permute(0, 2, 3, 1).flatten(1).cpu()
    nearest = [
        torch.cdist(row[None], torch.from_numpy(_drawings(prompt, images.shape[-1]))).amin()
        for row, prompt in zip(flat, prompts, strict=True)
    ]
    return -torch.stack(nearest) / flat.shape[1] ** 0.5


def template_match(images: Tensor, prompts: list[str]) -> Tensor:
    """Right number, ink and sign by drawn templates, (B,) in [0, 1]; images (B, 3, H, W) in [0, 1] of the signs world.

    It finds the number in another way than the reward of that world.
    """
    import torch

    return torch.from_numpy(signs.template_match(images.permute(0, 2, 3, 1).cpu().numpy(), prompts))
