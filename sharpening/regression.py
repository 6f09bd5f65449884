"""Regression on states that are known: what a model should output on them, and what each error weighs.

Every objective here is a weighted sum of errors whose weights are known before its gradient is taken, so it comes down
to rows: a state, its timestep, its condition, a target and a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from sharpening.trajectory import Branches, Path, Schedule
from sharpening.transfer import Agree, alone, slices, take

if TYPE_CHECKING:
    from sharpening.sdxl import Condition


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row: (R, ...) -> (R,)."""
    return (output - target).square().flatten(1).mean(1)


def masked_mean(values: Tensor, active: Tensor) -> Tensor:
    """Mean over the last axis, counting active entries only: (..., m) -> (...). Inactive values may be anything."""
    return torch.where(active, values, 0).sum(-1) / active.sum(-1)


class Rows(NamedTuple):
    """N rows to regress on: `sum(weight * mean square of (model(x, t, condition) - target))`."""

    x: Tensor  # (N, ...) states
    t: Tensor  # (N,) their timesteps
    condition: Condition  # of N rows
    target: Tensor  # (N, ...) what the model should output
    weight: Tensor  # (N,)

    def split(self, size: int, agree: Agree = alone) -> list[Rows]:
        """The rows in slices of `size`; any size gives the same sum. There are as many slices as `agree`, as of
        `Run.same_forwards`, says: what this process does not need is a row that weighs nothing."""
        parts = [self._slice(part) for part in slices(len(self.x), size)]
        idle = self._slice(slice(1))._replace(weight=torch.zeros_like(self.weight[:1]))
        return parts + [idle] * (agree(len(parts)) - len(parts))

    def _slice(self, part: slice) -> Rows:
        return Rows(*(p.rows(part) if p is self.condition else p[part] for p in self))

    def loss(self, output: Tensor) -> Tensor:
        """The weighted sum of the errors of a model's output (N, ...), a scalar."""
        return (self.weight * squared_error(output, self.target)).sum()


@dataclass(frozen=True)
class Regression:
    """How far a model's output along a branch is from what it should be.

    Attributes:
        schedule: of the model.
        kind: "noise" keeps the branch's own noise as the target at every step, as published (eq. 9). "consistent"
            takes the noise that leads from the state actually reached to the clean latent,
            `(x_k - alpha_k x_0) / sigma_k`; the two agree at the first step and part from the second on, where the
            state lies on the model's own path.
        snr_gamma: weighs every error by Min-SNR-gamma; None: all alike.
    """

    schedule: Schedule
    kind: Literal["noise", "consistent"] = "noise"
    snr_gamma: float | None = None

    def targets(self, branches: Branches, path: Path) -> Tensor:
        """What a model should output on the states of R branches, (R, m, ...)."""
        steps = path.t.shape[1]
        x_0, eps = (part[:, None].expand_as(path.x).flatten(0, 1) for part in (branches.x_0, branches.eps))
        x, t = path.x.flatten(0, 1), path.t.flatten()
        if self.kind == "consistent":
            alpha, sigma = self.schedule.alpha_sigma(t, x)
            eps = (x - alpha * x_0) / sigma
        return self.schedule.target(x_0, eps, t).unflatten(0, (-1, steps))

    def errors(self, branches: Branches, path: Path, output: Tensor) -> Tensor:
        """Errors (R, m) of a model's output (R, m, ...) on the states of R branches.

        The model need not be the one that walked them: a reference is measured on the same states.
        """
        target = self.targets(branches, path)
        error = squared_error(output.flatten(0, 1), target.flatten(0, 1)).unflatten(0, path.t.shape)
        return error * self._snr_weight(path.t)

    def rows(self, branches: Branches, path: Path, condition: Condition, weights: Tensor) -> Rows:
        """The active states of R branches as rows whose loss is `sum(weights * errors)`; condition is of R rows,
        weights (R, m)."""
        steps, weight = path.t.shape[1], weights * self._snr_weight(path.t)
        rows = [part.flatten(0, 1) for part in (path.x, path.t, self.targets(branches, path), weight)]
        condition = condition.repeat(steps)
        if not path.active.all():
            active = path.active.flatten().nonzero()[:, 0]
            rows, condition = take(rows, active), condition.rows(active)
        x, t, target, weight = rows
        return Rows(x, t, condition, target, weight)

    def _snr_weight(self, t: Tensor) -> Tensor | float:
        return 1.0 if self.snr_gamma is None else self.schedule.min_snr_weight(t, self.snr_gamma)


class Preference(NamedTuple):
    """The loss of B pairs and what it asks of the model's errors."""

    loss: Tensor  # (B,)
    logits: Tensor  # (B,) the argument of the log-sigmoid
    log_ratios: Tensor  # (B, 2) surrogate of log p_theta / p_ref: best, worst
    weights: Tensor | None = None  # (B, 2, m) derivative of the mean loss by each error; 0 for undecided pairs
