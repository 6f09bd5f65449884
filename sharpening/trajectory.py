"""The mathematics of a denoising trajectory: schedule, DDIM step, branches, walk, and generation.

Rows of a batch carry their own timesteps. Models appear only as plain callables, so a lambda can stand in for a UNet.
Notation follows the paper (Tian et al., arXiv 2502.12146): `x_t = alpha_t x_0 + sigma_t eps`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sharpening.transfer import Index, slices, take, upload

Predict = Callable[[Tensor, Tensor], Tensor]  # (x (R, ...), t (R,)) -> model output (R, ...)
Guide = Callable[[Tensor, Tensor, Tensor], Tensor]  # (output, x, t) -> the output that the sampler follows


class Model(NamedTuple):
    """What walks: a model with its condition, and the guidance on top of its output."""

    predict: Predict
    guide: Guide | None = None

    def direction(self, x: Tensor, t: Tensor) -> Tensor:
        """The output (R, ...) that a sampler follows from x (R, ...) at t (R,)."""
        output = self.predict(x, t)
        return output if self.guide is None else self.guide(output, x, t)


@dataclass(frozen=True)
class Schedule:
    """A variance-preserving noise schedule together with the stride of one trajectory step.

    Attributes:
        alphas_cumprod: `alpha_t^2` for every training timestep, shape (T,), in (0, 1].
        final_alpha_cumprod: `alpha^2` used once a step leaves the schedule at t < 0 (`set_alpha_to_one`).
        prediction_type: what the model outputs: "epsilon", "v_prediction" or "sample".
        stride: K of the paper: a step goes from `t` to `t - K`, in training timesteps.
        timesteps: the sampler's own grid for generation, descending, shape (infer_steps,).
    """

    alphas_cumprod: Tensor
    final_alpha_cumprod: float
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    stride: int
    timesteps: Tensor
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], infer_steps: int, prediction_type: str | None = None
    ) -> "Schedule":
        """Read a diffusers scheduler config; its betas, offset, spacing and final alpha are those of `DDIMScheduler`.

        `prediction_type` overrides the config's. Clipping is switched off because the states are latents: a config
        written by another scheduler class may not mention it, and `DDIMScheduler` would then clip at 1.
        """
        from diffusers import DDIMScheduler

        overrides = {"clip_sample": False, "thresholding": False}
        if prediction_type is not None:
            overrides["prediction_type"] = prediction_type
        scheduler = DDIMScheduler.from_config(config, **overrides)
        scheduler.set_timesteps(infer_steps)
        return cls(
            alphas_cumprod=scheduler.alphas_cumprod,
            final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
            prediction_type=scheduler.config.prediction_type,
            stride=scheduler.config.num_train_timesteps // infer_steps,
            timesteps=scheduler.timesteps,
        )

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """alpha^2, alpha and sigma of every timestep, and last of t < 0: (3, T + 1), made once for a device."""
        key = (device, dtype)
        if key not in self._tables:
            squared = self.alphas_cumprod.to(device, dtype)
            squared = torch.cat([squared, torch.full_like(squared[:1], self.final_alpha_cumprod)])
            self._tables[key] = torch.stack([squared, squared.sqrt(), (1 - squared).sqrt()])
        return self._tables[key]

    def factors(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """alpha_t and sigma_t for t of any shape, stacked: (2, ...), where t lies; t < 0 is past the last step."""
        return self._table(t.device, dtype)[1:, t.clamp(min=-1)]

    def alpha_sigma(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """`(alpha_t, sigma_t)` for t (R,), shaped to broadcast over `like` (R, ...); t < 0 is past the last step.

        t may lie on the host. A number is the timestep of all rows, and its factors are numbers, too.
        """
        if isinstance(t, int):
            alpha, sigma = self._table(torch.device("cpu"), like.dtype)[1:, max(t, -1)].tolist()
            return alpha, sigma
        return broadcast(upload(self.factors(t, like.dtype), like.device), like)

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`x_t` (R, ...) from clean `x_0` and noise `eps`, both (R, ...), at t (R,)."""
        alpha, sigma = self.alpha_sigma(t, x_0)
        return alpha * x_0 + sigma * eps

    def clean_and_noise(self, output: Tensor, x: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """The one-step clean estimate `x0_hat` (eq. 7) and the noise estimate that a model output (R, ...) implies."""
        return self.estimates(output, x, *self.alpha_sigma(t, x))

    def estimates(
        self, output: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """`clean_and_noise` where the factors are known already."""
        if self.prediction_type == "epsilon":
            return (x - sigma * output) / alpha, output
        if self.prediction_type == "v_prediction":
            return alpha * x - sigma * output, sigma * x + alpha * output
        return output, (x - alpha * output) / sigma

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the model should output, (R, ...), if the clean latent is `x_0` and the noise is `eps`."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "v_prediction":
            alpha, sigma = self.alpha_sigma(t, x_0)
            return alpha * eps - sigma * x_0
        return x_0

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Min-SNR-gamma loss weight (Hang et al., arXiv 2303.09556) for t (R,), float32 (R,)."""
        squared = self._table(t.device, torch.float32)[0, t]
        snr = squared / (1 - squared)
        clipped = snr.clamp(max=gamma)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.prediction_type]
        return clipped / divisor


def broadcast(factors: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Each of the factors (k, R), shaped to broadcast over `like` (R, ...)."""
    return factors.view(*factors.shape, *[1] * (like.ndim - 1)).unbind()


def ddim_step(
    schedule: Schedule, x0_hat: Tensor, eps_hat: Tensor, t: Tensor | int, noise: Tensor | None = None
) -> Tensor:
    """One DDIM step (Song et al., arXiv 2010.02502, eq. 12) of rows (R, ...) from t (R,) to t - stride.

    Without `noise` it is deterministic (eta = 0); with it, of the same shape, stochastic (eta = 1).
    """
    if noise is None:
        alpha, sigma = schedule.alpha_sigma(t - schedule.stride, x0_hat)
        return alpha * x0_hat + sigma * eps_hat
    alpha, remaining, spread = stochastic_factors(schedule, t, x0_hat)
    return alpha * x0_hat + remaining * eps_hat + spread * noise


def stochastic_factors(schedule: Schedule, t: Tensor | int, like: Tensor) -> tuple[Tensor | float, ...]:
    """Factors of `x0_hat`, `eps_hat` and fresh noise in a DDIM step with eta = 1 (eq. 16), shaped to broadcast, or
    numbers if t is one."""
    alpha, sigma = schedule.alpha_sigma(t - schedule.stride, like)
    alpha_t, sigma_t = schedule.alpha_sigma(t, like)
    spread = sigma / sigma_t * _root(1 - (alpha_t / alpha) ** 2)
    return alpha, _root(sigma**2 - spread**2), spread


def _root(value: Tensor | float) -> Tensor | float:
    """The square root of what only rounding can make negative."""
    return max(value, 0.0) ** 0.5 if isinstance(value, float) else value.clamp(min=0).sqrt()


class Branches(NamedTuple):
    """R branches where they begin: `x_t = alpha_t x_0 + sigma_t eps`."""

    x_0: Tensor  # (R, ...) clean latents
    eps: Tensor  # (R, ...) noise
    t: Tensor  # (R,) first timestep; on the host, which then need not ask the device where a branch ends
    x_t: Tensor  # (R, ...)

    @classmethod
    def begin(cls, schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor) -> "Branches":
        """Noise clean latents (R, ...) with eps (R, ...) at t (R,)."""
        return cls(x_0, eps, t, schedule.add_noise(x_0, eps, t))

    def rows(self, index: Index) -> "Branches":
        """The branches that `index`, on the CPU, names."""
        return Branches(*take(self, index))

    def start(self) -> "Path":
        """Their first states as paths of one step."""
        t, active = upload(self.t, self.x_t.device), torch.ones(len(self.t), 1, dtype=torch.bool)
        return Path(self.x_t[:, None], t[:, None], active)


class Step(NamedTuple):
    """One step of a walk over R rows."""

    x: Tensor  # (R, ...) the state the model saw
    t: Tensor  # (R,) its timestep; rows that are no longer active repeat a harmless 0
    output: Tensor  # (R, ...) the conditional model output, with its graph
    x0_hat: Tensor  # (R, ...) the clean estimate on the sampler's (guided) direction
    eps_hat: Tensor  # (R, ...) the noise estimate on that direction
    active: Tensor  # (R,) bool: False once the row has stepped below t = 0; where the walk's t lies
    onward: tuple[Tensor, Tensor]  # alpha and sigma where the step leads

    def moved(self) -> Tensor:
        """The state (R, ...) that the step leads to (DDIM, eta = 0); that of an inactive row stays."""
        alpha, sigma = self.onward
        return self.where_active(alpha * self.x0_hat + sigma * self.eps_hat, self.x)

    def where_active(self, new: Tensor, old: Tensor) -> Tensor:
        """Rows of `new` (R, ...) where the step is active, of `old` where it is not."""
        if self.active.all():
            return new
        return torch.where(*broadcast(upload(self.active, new.device)[None], new), new, old)


def walk(model: Model, schedule: Schedule, x: Tensor, t: Tensor, steps: int, detach: bool = True) -> Iterator[Step]:
    """Walk `steps` sampling steps from x (R, ...) at t (R,), yielding every step before the state moves on.

    The states are data: with `detach` the sampler's update carries no gradient, so a state is the same whether its
    step's output has a graph or not. `detach=False` keeps the graph through the sampler, as the released code does.
    With t on the host, what the schedule says of all steps is copied to the device once.
    """
    along = timesteps_along(schedule, t, steps)
    active, seen = along >= 0, along.clamp(min=0)
    of_steps = torch.cat([schedule.factors(seen, x.dtype), schedule.factors(seen - schedule.stride, x.dtype)])
    of_steps, t = upload(of_steps, x.device).unbind(2), upload(seen, x.device).unbind(1)
    for k in range(steps):
        alpha, sigma, *onward = broadcast(of_steps[k], x)
        output = model.predict(x, t[k])
        direction = output.detach() if detach else output
        if model.guide is not None:
            direction = model.guide(direction, x, t[k])
        estimates = schedule.estimates(direction, x, alpha, sigma)
        step = Step(x, t[k], output, *estimates, active[:, k], tuple(onward))
        yield step
        if k < steps - 1:
            x = step.moved()


class Path(NamedTuple):
    """The m states of R branches, as data."""

    x: Tensor  # (R, m, ...)
    t: Tensor  # (R, m) timesteps; 0 where inactive
    active: Tensor  # (R, m) bool, on the CPU: False where the branch has stepped below t = 0 already
    output: Tensor | None = None  # (R, m, ...) what the model that walked made of them, where it was asked

    def rows(self, index: Index) -> "Path":
        """The branches that `index`, on the CPU, names."""
        return Path(*take(self, index))

    def first(self, steps: int) -> "Path":
        """The first steps of every branch."""
        return Path(*(None if part is None else part[:, :steps] for part in self))


def timesteps_along(schedule: Schedule, t: Tensor, steps: int) -> Tensor:
    """The timesteps (R, steps) of branches that start at t (R,); below 0 a branch has ended."""
    return t[:, None] - schedule.stride * torch.arange(steps, device=t.device)


@torch.no_grad()
def walk_path(
    model_of: Callable[[Index], Model], schedule: Schedule, branches: Branches, steps: int, batch_size: int,
    outputs: bool,
) -> Path:  # fmt: skip
    """The path of R branches, `batch_size` of which are walked at a time.

    `model_of(rows)` is the model with the condition of some of the branches. It is asked `steps` times or, without
    `outputs`, which the path then lacks, once less.
    """
    if steps == 1 and not outputs:
        return branches.start()
    x, output = [], []
    for rows in slices(len(branches.t), batch_size):
        part = branches.rows(rows)
        points = [*walk(model_of(rows), schedule, part.x_t, part.t, steps if outputs else steps - 1)]
        last = [] if outputs else [points[-1].moved()]
        x.append(torch.stack([point.x for point in points] + last, 1))
        if outputs:
            output.append(torch.stack([point.output for point in points], 1))
    t = timesteps_along(schedule, branches.t, steps)
    seen = upload(t.clamp(min=0), branches.x_t.device)
    return Path(torch.cat(x), seen, (t >= 0).cpu(), torch.cat(output) if outputs else None)


def outputs_through_sampler(model: Model, schedule: Schedule, branches: Branches, steps: int) -> Tensor:
    """The outputs (R, steps, ...) along branches with the graph through the sampler, which grows with `steps`."""
    points = walk(model, schedule, branches.x_t, branches.t, steps, detach=False)
    return torch.stack([point.output for point in points], 1)


def generate(model: Model, schedule: Schedule, x: Tensor) -> Tensor:
    """Sample clean latents (R, ...) from Gaussian noise x (R, ...) along the scheduler's own grid of timesteps.

    Equals `DDIMScheduler` in a diffusers pipeline with eta = 0.
    """
    for timestep in schedule.timesteps.tolist():
        t = torch.full((len(x),), timestep, device=x.device)
        x = ddim_step(schedule, *schedule.clean_and_noise(model.direction(x, t), x, timestep), timestep)
    return x


def classifier_free_guidance(predict_unconditional: Predict, scale: float) -> Guide:
    """The guide `u + scale (c - u)` (Ho & Salimans, arXiv 2207.12598), its unconditional part without gradient."""

    def guide(output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            unconditional = predict_unconditional(x, t)
        return unconditional + scale * (output - unconditional)

    return guide
