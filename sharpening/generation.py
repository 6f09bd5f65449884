"""Latents that the current model generates, and what of them outlives the optimizer step that made them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpening.selection import ModelOf, Scores
from sharpening.trajectory import Schedule, generate


@torch.no_grad()
def generate_in_slices(model_of: ModelOf, schedule: Schedule, noise: Tensor, batch_size: int) -> Tensor:
    """Clean latents (R, ...) of Gaussian noise (R, ...), `batch_size` at a time."""
    parts = torch.arange(len(noise)).split(batch_size)
    return torch.cat([generate(model_of(rows), schedule, noise[rows]) for rows in parts])


def not_finite(latents: Tensor, step: int) -> str:
    """What is to be said if the generated latents of a step are not finite, or nothing."""
    if latents.isfinite().all():
        return ""
    return (
        f"step {step}: the generated latents are not finite; use --mixed_precision=bf16, or a lower --learning_rate "
        "if earlier steps were well"
    )


class Generations:
    """The generation under way, micro-batch by micro-batch, for all optimizer steps that it serves.

    Attributes:
        batches: the prompts of each micro-batch, collated rows of `CachedData`.
        made: for each micro-batch that has latents, `{"prompts": list[str], "latents": Tensor}`. A checkpoint keeps
            this list as it is: the weights that made the latents are gone.
        scores: of each micro-batch whose latents were judged.
    """

    def __init__(self) -> None:
        self.batches: list[Mapping[str, Any]] = []
        self.made: list[dict[str, Any]] = []
        self.scores: list[Scores] = []

    def begin(self, batches: Sequence[Mapping[str, Any]], shape: Sequence[int]) -> bool:
        """Take up new prompts; returns whether `made`, read from a checkpoint, are latents of `shape` for them."""
        self.batches, self.scores = list(batches), []
        made = [(entry["prompts"], tuple(entry["latents"].shape)) for entry in self.made]
        return made == [(batch["caption"], tuple(shape)) for batch in batches]

    def add(self, prompts: Sequence[str], latents: Tensor) -> None:
        """Keep the latents of the next micro-batch."""
        self.made.append({"prompts": list(prompts), "latents": latents})
