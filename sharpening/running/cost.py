"""What a run has cost so far, over all processes and all launches, and where the seconds of a step went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sharpening.running.launching import sum_over_ranks
from sharpening.running.metric_names import PHASES

if TYPE_CHECKING:
    from sharpening.rewards.calling import Reward

COUNTED = ("rows_without_gradient", "rows_trained", "images_judged")
TRAINED_ROW = 3  # forwards that a row costs which is trained on: its backward costs two


class Cost:
    """Counts what passes through the UNets of a run, and what its reward judges, as it happens.

    Validation is left out: it teaches nothing, and runs that validate more often would seem dearer.

    Attributes:
        total: of all processes up to the last finished step, and its seconds of the main one; a checkpoint keeps it.
        reward: whose images are counted, if there is one.
    """

    def __init__(self, before: Mapping[str, float]) -> None:
        """`before` is the `total` of the checkpoint that is resumed, empty for a new run."""
        self.total = {name: before.get(name, 0) for name in (*COUNTED, "seconds")}
        self.reward: Reward | None = None
        self._here: Counter[str] = Counter()  # rows of this process since the last finished step
        self._judged = 0  # images that the reward had judged by then

    def watch(self, unet: nn.Module) -> None:
        """Count the rows of every forward of a UNet. Blocks that activation checkpointing runs again are no forward
        of it."""
        unet.register_forward_pre_hook(self._count)

    def _count(self, unet: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._here["rows_trained" if torch.is_grad_enabled() else "rows_without_gradient"] += len(inputs[0])

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within, nothing is counted."""
        here, judged = self._here.copy(), self._judged_ever
        yield
        self._here = here
        self._judged += self._judged_ever - judged

    @property
    def _judged_ever(self) -> int:
        return 0 if self.reward is None else self.reward.judged

    def end_step(
        self, seconds: float, phases: Mapping[str, float], hosts: torch.distributed.ProcessGroup | None
    ) -> dict[str, float]:
        """The curves `cost/` and `time/` of a step that took `seconds` on this process, some of them in phases; every
        rank must call it. hosts: as of `launching.any_rank`."""
        self._here["images_judged"], self._judged = self._judged_ever - self._judged, self._judged_ever
        of_step = sum_over_ranks(torch.tensor([self._here[name] for name in COUNTED]), hosts).tolist()
        self._here.clear()
        spent = {name: phases.get(name, 0.0) for name in PHASES}
        learning = seconds - spent["validation"]
        for name, value in zip((*COUNTED, "seconds"), (*of_step, learning), strict=True):
            self.total[name] += value
        forwards = self.total["rows_without_gradient"] + TRAINED_ROW * self.total["rows_trained"]
        rest = {"step": learning, "other": max(0.0, seconds - sum(spent.values()))}
        return {
            "cost/forwards": forwards,
            **{f"cost/{name}": value for name, value in self.total.items()},
            **{f"time/{name}": value for name, value in (rest | spent).items()},
        }
