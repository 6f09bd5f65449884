"""Warnings about a run that is learning nothing."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sharpening.sharding import local

logger = logging.getLogger(__name__)


class Watch:
    """Says once what a person would otherwise find out too late: that a run is learning nothing."""

    FLAT_STEPS = 20  # steps in a row in which no prompt's branches differ in reward
    IDLE_STEPS = 20  # steps after which some parameter must have moved
    CHANCE_PAIRS = 2000  # pairs after which the accuracy is compared with a coin's: its standard error is then 0.011

    def __init__(self, rows: int, parameters: Sequence[Tensor]):
        self.rows = rows  # of an optimizer step, over all processes
        self.flat = self.steps = 0
        self.pairs = self.preferred = 0.0
        self.said: set[str] = set()
        # A few entries of each: Adam moves every entry that has a gradient.
        self.before = self._entries(parameters)

    @staticmethod
    def _entries(parameters: Sequence[Tensor]) -> list[Tensor]:
        return [local(parameter.detach()).flatten()[:64].clone() for parameter in parameters]

    def check(self, metrics: Mapping[str, float], parameters: Sequence[Tensor]) -> None:
        """Look at a finished optimizer step: its metrics, and the parameters after it."""
        self.steps += 1
        self.flat = self.flat + 1 if metrics.get("reward/tie_rate") == 1 else 0
        pairs = self.rows * (1 - metrics.get("reward/tie_rate", 0)) if "preference/accuracy" in metrics else 0
        self.preferred += pairs * metrics.get("preference/accuracy", 0)
        self.pairs += pairs
        if self.flat == self.FLAT_STEPS:
            self._warn(
                f"in {self.flat} steps no two branches of a prompt earned different rewards, so nothing is being "
                "selected: look at the images in --output_dir, and try --reward_model on them by `python reward.py`"
            )
        if self.pairs >= self.CHANCE_PAIRS > self.pairs - pairs:
            accuracy, coin = self.preferred / self.pairs, 0.5 + 2 * 0.5 / self.pairs**0.5
            if accuracy < coin:
                self._warn(
                    f"the model preferred the better branch in {accuracy:.3f} of {self.pairs:.0f} pairs, which cannot "
                    "be told from a coin's 0.5 (preference/accuracy): raise --learning_rate, or see in docs/method.md "
                    "when --reward_on sample helps"
                )
        if self.steps == self.IDLE_STEPS:
            if all(map(torch.equal, self.before, self._entries(parameters))):
                self._warn(
                    f"no parameter changed in {self.steps} steps: the gradient was zero or skipped each time; look at "
                    "grad_norm, lr and reward/tie_rate, and with --mixed_precision fp16 try bf16"
                )
            self.before = []

    def _warn(self, message: str) -> None:
        kind = message.split(":")[-1]
        if kind not in self.said:
            self.said.add(kind)
            logger.warning(message)
