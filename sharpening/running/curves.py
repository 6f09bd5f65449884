"""The curves of an optimizer step: means over all that it saw."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from sharpening.regression import Preference, squared_error
from sharpening.selection import Scores, Selection
from sharpening.transfer import upload

ROUNDING = 1e-6  # of a difference of errors near 1 in float32; at the reference itself nothing else is left


class Means:
    """Means over everything that an optimizer step saw, on all ranks; the device is waited for once, at the end.

    Every rank must add the same names in the same order; a mask may leave a name without any value.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._added: list[tuple[str, Tensor, Tensor | None]] = []

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Count `values` of any shape, where `mask` of that shape, bool on the CPU, is True."""
        # The norm of a gradient that lies in parts is in parts, too.
        values = values.full_tensor() if isinstance(values, DTensor) else values
        self._added.append((name, values.detach(), mask))

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks, names without a value left out; starts anew."""
        totals: dict[str, np.ndarray] = {}  # name -> (2,) sum and count
        for (name, _, mask), values in zip(self._added, self._on_host(), strict=True):
            counted = values if mask is None else values[mask.flatten().numpy()]
            totals[name] = totals.get(name, 0) + np.array([counted.sum(dtype=np.float64), counted.size])
        self._added.clear()
        stacked = np.stack([*totals.values()])  # (names, 2)
        if accelerator.num_processes > 1:
            stacked = accelerator.reduce(upload(torch.from_numpy(stacked), self.device), reduction="sum").tolist()
        return {name: float(total / count) for name, (total, count) in zip(totals, stacked, strict=True) if count}

    def _on_host(self) -> list[np.ndarray]:
        """All values, flat, those of the device copied together."""
        values = [values.flatten() for _, values, _ in self._added]
        there = [index for index, value in enumerate(values) if value.device.type != "cpu"]
        if there:
            sizes = [len(values[index]) for index in there]
            copied = torch.cat([values[index].float() for index in there]).cpu().split(sizes)
            for index, value in zip(there, copied, strict=True):
                values[index] = value
        return [value.numpy() for value in values]


def add_rewards(
    means: Means, scores: Scores, selection: Selection, t: Tensor | None = None, num_train_timesteps: int = 0
) -> None:
    """Add the reward curves of a scored batch of B prompts; t (B,) is where their branches start, if it matters.

    `reward/spread` is the standard deviation over a prompt's branches (the band of the paper's figure 6).
    `reward/timesteps_q1` to `_q4` are the mean reward of branches by the quarter of the training timesteps in which
    they start, q1 being the cleanest. `reward/failure_rate` is the share of branches that have no reward
    (`--reward_failure=skip`); the other curves are over those that have one.
    """
    branch, scored = selection.branch_reward, selection.scored  # (B, n)
    usable = scored.any(1)  # (B,)
    count = scored.sum(1).clamp(min=1)
    mean = torch.where(scored, branch, 0).sum(1) / count  # (B,)
    variance = torch.where(scored, (branch - mean[:, None]).square(), 0).sum(1) / count
    means.add("reward/mean", branch, scored)
    means.add("reward/best", branch.gather(1, selection.best[:, None])[:, 0], usable)
    means.add("reward/worst", branch.gather(1, selection.worst[:, None])[:, 0], usable)
    means.add("reward/spread", variance.sqrt(), usable)
    means.add("reward/tie_rate", selection.tied, usable)
    means.add("reward/failure_rate", ~scored)
    for name, values in scores.components.items():
        means.add(f"reward/component/{name}", values, scores.active & ~values.isnan())
    if t is None:
        return
    quarter = t * 4 // num_train_timesteps  # (B,)
    for index in range(4):
        means.add(f"reward/timesteps_q{index + 1}", branch, scored & (quarter == index)[:, None])


def add_preference(
    means: Means, preference: Preference, rewards: Tensor | None, decided: Tensor, won: str = "preference/accuracy"
) -> None:
    """Add the curves of B preference pairs; rewards (B, 2), best first, if a reward chose them, and decided (B,) bool:
    they differ.

    `preference/accuracy` is the share of pairs in which the model, measured against the reference, fits the better
    branch better (a half where both fit alike, up to rounding), `preference/logits` the mean argument of the
    log-sigmoid, `preference/log_ratio_best` and `_worst` the two surrogates of `log p_theta / p_ref` whose difference
    it scales. `won` names the first of them otherwise, where a coin's share is no sign that nothing is learned.
    """
    best, worst = preference.log_ratios.T
    means.add("loss", preference.loss, decided)
    difference = best - worst
    alike = difference.abs() < ROUNDING
    means.add(won, torch.where(alike, 0.5, (difference > 0).float()), decided)
    means.add("preference/logits", preference.logits, decided)
    means.add("preference/log_ratio_best", best, decided)
    means.add("preference/log_ratio_worst", worst, decided)
    if rewards is not None:
        means.add("reward/margin", rewards[:, 0] - rewards[:, 1], decided)


def add_divergence(means: Means, output: Tensor, reference_output: Tensor, active: Tensor) -> None:
    """Add `preference/kl`, the mean squared difference of two models' outputs (R, m, ...) on the same states: the KL
    divergence of one denoising step from the reference's, up to the schedule's factor.

    reference_output (R, k, ...) and active (R, k) are of the first k steps.
    """
    first = output[:, : active.shape[1]].flatten(0, 1)
    divergence = squared_error(first, reference_output.flatten(0, 1)).view(active.shape)
    means.add("preference/kl", divergence, active)
