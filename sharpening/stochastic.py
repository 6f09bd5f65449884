"""Stochastic sampling paths whose steps have a known log-density: what a policy gradient and a preference over paths
train on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sharpening.errors import require
from sharpening.trajectory import Model, Schedule, ddim_step, stochastic_factors
from sharpening.transfer import Index, take


class Transitions(NamedTuple):
    """m steps of the stochastic paths of R samples, as regression problems."""

    x: Tensor  # (R, m, ...) the states that were left
    t: Tensor  # (R, m) their timesteps
    target: Tensor  # (R, m, ...) what a model would output that expects the state reached
    precision: Tensor  # (R, m) -log p(reached | x) = precision * mean squared error of the output + a constant

    def rows(self, index: Index) -> Transitions:
        """The paths that `index`, on the CPU, names."""
        return Transitions(*take(self, index))


def check_start(schedule: Schedule, method: str) -> None:
    """Refuse a schedule whose sampling starts from pure noise, of which a step has no density.

    Raises:
        UserError: naming the method and the remedy.
    """
    require(
        bool((schedule.alphas_cumprod[schedule.timesteps] > 0).all()),
        f"{method} cannot take a step from pure noise, where this model's sampling starts; use a scheduler without "
        "rescale_betas_zero_snr",
    )


def sample_paths(
    model: Model, schedule: Schedule, x: Tensor, noises: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, Transitions]:
    """Sample clean latents (R, ...) from noise x (R, ...) by DDIM with eta = 1, and m transitions of each row's path.

    noises (R, T - 1, ...) are what the steps add; the last of the T steps is deterministic. kept (R, m) says which
    steps of a row to return, in [0, T - 1); None: all T - 1, in their order.

    The mean of a step is linear in the noise estimate e with a slope c: a step that added `spread * z` is what a model
    would expect whose estimate is `e + spread z / c`. The log-density of the step, as a mean over elements (as in
    DDPO), is therefore minus a squared error times `c^2 / (2 spread^2)`. With guidance, e is the guided estimate, and
    the target is what the guided output should be.
    """
    transitions = []
    *stochastic, last = schedule.timesteps.tolist()
    for step, timestep in enumerate(stochastic):
        t = torch.full((len(x),), timestep, device=x.device)
        x0_hat, eps_hat = schedule.clean_and_noise(model.direction(x, t), x, timestep)
        alpha_t, sigma_t = schedule.alpha_sigma(timestep, x)
        alpha, remaining, spread = stochastic_factors(schedule, timestep, x)
        slope = remaining - alpha * sigma_t / alpha_t
        eps = eps_hat + spread / slope * noises[:, step]
        target = schedule.target((x - sigma_t * eps) / alpha_t, eps, t)
        # An error of the noise estimate, in units of what the model outputs.
        unit = {"epsilon": 1.0, "v_prediction": alpha_t, "sample": alpha_t / sigma_t}[schedule.prediction_type]
        precision = torch.full((len(x),), (slope * unit / spread) ** 2 / 2, dtype=x.dtype, device=x.device)
        transitions.append((x, t, target, precision))
        x = ddim_step(schedule, x0_hat, eps_hat, timestep, noises[:, step])
    t = torch.full((len(x),), last, device=x.device)
    x_0 = ddim_step(schedule, *schedule.clean_and_noise(model.direction(x, t), x, last), last)
    path = Transitions(*(torch.stack(part, 1) for part in zip(*transitions, strict=True)))
    if kept is not None:
        rows = torch.arange(len(x), device=x.device)[:, None]
        path = Transitions(*(part[rows, kept] for part in path))
    return x_0, path
