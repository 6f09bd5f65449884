"""The mathematics of a denoising trajectory: schedule, DDIM step, walk, generation, and selection.

Rows of a batch carry their own timesteps. Models appear only as plain callables, so a lambda can stand in for a UNet.
Notation follows the paper (Tian et al., arXiv 2502.12146): `x_t = alpha_t x_0 + sigma_t eps`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sharpening.waiting import beginning, wait_for_all

Predict = Callable[[Tensor, Tensor], Tensor]  # (x (R, ...), t (R,)) -> model output (R, ...)
Guide = Callable[[Tensor, Tensor, Tensor], Tensor]  # (output, x, t) -> the output that the sampler follows


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

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`(alpha_t, sigma_t)` for t (R,), shaped to broadcast over `like` (R, ...); t < 0 is past the last step."""
        table = self.alphas_cumprod.to(like)
        squared = torch.where(t >= 0, table[t.clamp(min=0)], torch.full_like(table[:1], self.final_alpha_cumprod))
        squared = squared.view(-1, *[1] * (like.ndim - 1))
        return squared.sqrt(), (1 - squared).sqrt()

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """`x_t` (R, ...) from clean `x_0` and noise `eps`, both (R, ...), at t (R,)."""
        alpha, sigma = self.alpha_sigma(t, x_0)
        return alpha * x_0 + sigma * eps

    def clean_and_noise(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The one-step clean estimate `x0_hat` (eq. 7) and the noise estimate that a model output (R, ...) implies."""
        alpha, sigma = self.alpha_sigma(t, x)
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
        squared = self.alphas_cumprod.to(t.device)[t]
        snr = squared / (1 - squared)
        clipped = snr.clamp(max=gamma)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.prediction_type]
        return clipped / divisor


def ddim_step(schedule: Schedule, x0_hat: Tensor, eps_hat: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
    """One DDIM step (Song et al., arXiv 2010.02502, eq. 12) of rows (R, ...) from t (R,) to t - stride.

    Without `noise` it is deterministic (eta = 0); with it, of the same shape, stochastic (eta = 1).
    """
    if noise is None:
        alpha, sigma = schedule.alpha_sigma(t - schedule.stride, x0_hat)
        return alpha * x0_hat + sigma * eps_hat
    alpha, remaining, spread = _stochastic_step(schedule, t, x0_hat)
    return alpha * x0_hat + remaining * eps_hat + spread * noise


def _stochastic_step(schedule: Schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of `x0_hat`, `eps_hat` and fresh noise in a DDIM step with eta = 1 (eq. 16), shaped to broadcast."""
    alpha, sigma = schedule.alpha_sigma(t - schedule.stride, like)
    alpha_t, sigma_t = schedule.alpha_sigma(t, like)
    spread = sigma / sigma_t * (1 - (alpha_t / alpha) ** 2).clamp(min=0).sqrt()
    return alpha, (sigma**2 - spread**2).clamp(min=0).sqrt(), spread


class Step(NamedTuple):
    """One step of a walk over R rows."""

    x: Tensor  # (R, ...) the state the model saw
    t: Tensor  # (R,) its timestep; rows that are no longer active repeat a harmless 0
    output: Tensor  # (R, ...) the conditional model output, with its graph
    x0_hat: Tensor  # (R, ...) the clean estimate on the sampler's (guided) direction
    active: Tensor  # (R,) bool: False once the row has stepped below t = 0

    def rows(self, index: Tensor) -> "Step":
        return Step(*(part[index] for part in self))


def walk(
    predict: Predict,
    schedule: Schedule,
    x: Tensor,
    t: Tensor,
    steps: int,
    guide: Guide | None = None,
    detach: bool = True,
) -> Iterator[Step]:
    """Walk `steps` sampling steps from x (R, ...) at t (R,), yielding every step before the state moves on.

    The states are data: with `detach` the sampler's update carries no gradient, so each step's `output` has a graph of
    its own and can be backpropagated and freed before the next step. `detach=False` keeps the graph through the
    sampler, as the released code does. `guide` turns the conditional output into the direction that is followed.
    """
    for _ in range(steps):
        active = t >= 0
        t_seen = t.clamp(min=0)
        output = predict(x, t_seen)
        direction = output.detach() if detach else output
        if guide is not None:
            direction = guide(direction, x, t_seen)
        x0_hat, eps_hat = schedule.clean_and_noise(direction, x, t_seen)
        yield Step(x, t_seen, output, x0_hat, active)
        moved = ddim_step(schedule, x0_hat, eps_hat, t_seen)
        x = torch.where(active.view(-1, *[1] * (x.ndim - 1)), moved, x)
        t = t - schedule.stride


def generate(predict: Predict, schedule: Schedule, x: Tensor, guide: Guide | None = None) -> Tensor:
    """Sample clean latents (R, ...) from Gaussian noise x (R, ...) along the scheduler's own grid of timesteps.

    Equals `DDIMScheduler` in a diffusers pipeline with eta = 0.
    """
    for timestep in schedule.timesteps.tolist():
        t = torch.full((len(x),), timestep, device=x.device)
        output = predict(x, t)
        if guide is not None:
            output = guide(output, x, t)
        x = ddim_step(schedule, *schedule.clean_and_noise(output, x, t), t)
    return x


class Transition(NamedTuple):
    """One step of a stochastic sampling path of R rows, as a regression problem; see `sample_path`."""

    x: Tensor  # (R, ...) the state that was left
    t: Tensor  # (R,) its timestep
    x_0: Tensor  # (R, ...) the clean latent and
    eps: Tensor  # (R, ...) the noise of that state which a model would have to predict to expect the state reached
    precision: Tensor  # (R,) -log p(reached | x) = precision * mean squared error of the model's output + a constant


def sample_path(
    predict: Predict, schedule: Schedule, x: Tensor, noises: Tensor, kept: Tensor
) -> tuple[Tensor, list[Transition]]:
    """Sample clean latents (R, ...) from noise x (R, ...) by DDIM with eta = 1, and m transitions of each row's path.

    noises (R, T - 1, ...) are what the steps add; the last of the T steps is deterministic. kept (R, m) says which
    steps of a row to return, in [0, T - 1).

    A step is Gaussian, and its mean is linear in the noise estimate e with a slope c: a step that added `spread * z`
    is what a model would expect whose estimate is `e + spread z / c`. The log-density of the step, as a mean over
    elements (as in DDPO, Black et al., arXiv 2305.13301), is therefore minus a squared error times
    `c^2 / (2 spread^2)`.
    """
    transitions = []
    *stochastic, last = schedule.timesteps.tolist()
    for step, timestep in enumerate(stochastic):
        t = torch.full((len(x),), timestep, device=x.device)
        x0_hat, eps_hat = schedule.clean_and_noise(predict(x, t), x, t)
        noise = noises[:, step]
        alpha_t, sigma_t = schedule.alpha_sigma(t, x)
        alpha, remaining, spread = _stochastic_step(schedule, t, x)
        slope = remaining - alpha * sigma_t / alpha_t
        eps = eps_hat + spread * noise / slope
        # An error of the noise estimate, in units of what the model outputs.
        unit = {"epsilon": torch.ones_like(alpha_t), "v_prediction": alpha_t, "sample": alpha_t / sigma_t}
        precision = (slope * unit[schedule.prediction_type] / spread).square().flatten() / 2
        transitions.append(Transition(x, t, (x - sigma_t * eps) / alpha_t, eps, precision))
        x = ddim_step(schedule, x0_hat, eps_hat, t, noise)
    t = torch.full((len(x),), last, device=x.device)
    x_0 = ddim_step(schedule, *schedule.clean_and_noise(predict(x, t), x, t), t)
    path = Transition(*map(torch.stack, zip(*transitions, strict=True)))  # (T - 1, R, ...)
    rows = torch.arange(len(x))
    return x_0, [Transition(*(part[steps, rows] for part in path)) for steps in kept.T]


def classifier_free_guidance(predict_unconditional: Predict, scale: float) -> Guide:
    """The guide `u + scale (c - u)` (Ho & Salimans, arXiv 2207.12598), its unconditional part without gradient."""

    def guide(output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            unconditional = predict_unconditional(x, t)
        return unconditional + scale * (output - unconditional)

    return guide


def branch_target(
    schedule: Schedule, step: Step, x_0: Tensor, eps: Tensor, kind: Literal["noise", "consistent"]
) -> Tensor:
    """The regression target (R, ...) of one step of a branch that began at `alpha x_0 + sigma eps`.

    "noise" keeps the branch's own noise at every step, as published (eq. 9). "consistent" takes the noise that leads
    from the state actually reached to the clean latent, `(x_k - alpha_k x_0) / sigma_k`; the two agree at the first
    step and part from the second on, where the state lies on the model's own path.
    """
    if kind == "consistent":
        alpha, sigma = schedule.alpha_sigma(step.t, step.x)
        eps = (step.x.detach() - alpha * x_0) / sigma
    return schedule.target(x_0, eps, step.t)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row: (R, ...) -> (R,)."""
    return (output - target).square().flatten(1).mean(1)


def branch_error(
    schedule: Schedule,
    step: Step,
    output: Tensor,
    x_0: Tensor,
    eps: Tensor,
    kind: Literal["noise", "consistent"],
    snr_gamma: float | None,
) -> Tensor:
    """How far a model's output (R, ...) at one step of a branch is from the branch's target, (R,).

    The model need not be the one that walked the branch: a reference is measured on the same states. `snr_gamma`
    weighs the error by Min-SNR-gamma.
    """
    error = squared_error(output, branch_target(schedule, step, x_0, eps, kind))
    return error if snr_gamma is None else error * schedule.min_snr_weight(step.t, snr_gamma)


def weighted_errors(
    predict: Predict,
    schedule: Schedule,
    x_t: Tensor,
    t: Tensor,
    x_0: Tensor,
    eps: Tensor,
    weights: Tensor,
    guide: Guide | None,
    detach: bool,
    kind: Literal["noise", "consistent"],
    snr_gamma: float | None,
) -> Iterator[Tensor]:
    """Walk R branches and yield `sum_r weights[r, k] * error[r, k]` for each step k: an objective whose weights (R, m)
    are known beforehand, step by step, so that each scalar can be backpropagated before the next forward.

    x_t, x_0, eps (R, ...) are the start, clean latent and noise of each branch, t (R,) where it starts; `detach` is as
    for `walk`, `kind` and `snr_gamma` as for `branch_error`.
    """
    for k, point in enumerate(walk(predict, schedule, x_t, t, weights.shape[1], guide, detach)):
        yield (weights[:, k] * branch_error(schedule, point, point.output, x_0, eps, kind, snr_gamma)).sum()


def masked_mean(values: Tensor, active: Tensor) -> Tensor:
    """Mean over the last axis, counting active entries only: (..., m) -> (...). Inactive values may be anything."""
    return torch.where(active, values, 0).sum(-1) / active.sum(-1)


# `judge(latents (r, ...), rows (r,))` begins to judge some of R rows; what it returns waits for their total reward
# (r,) and its components, name -> (r,).
Verdict = tuple[Tensor, Mapping[str, Tensor]]
Judge = Callable[[Tensor, Tensor], Callable[[], Verdict]]


class Scores(NamedTuple):
    """What the score pass learned about R branches of m steps."""

    rewards: Tensor  # (R, m) float32 on the CPU; 0 where inactive, NaN where the reward failed and was told to skip
    components: dict[str, Tensor]  # name -> (R, m), the raw value of every component of the reward, NaN without one
    active: Tensor  # (R, m) bool on the CPU
    last_estimate: Tensor  # (R, ...) the clean estimate of every branch's last active step
    path: list[Step]  # the m steps of all R branches, if they were to be kept; else empty


@torch.no_grad()
def score_branches(
    model: Callable[[Tensor], tuple[Predict, Guide | None]],
    judge: Judge,
    schedule: Schedule,
    x_t: Tensor,
    t: Tensor,
    steps: int,
    batch_size: int,
    keep_path: bool = False,
) -> Scores:
    """Walk all branches x_t (R, ...) from t (R,) without gradient and judge the clean estimate of every active step.

    `batch_size` branches are walked at a time, so activations grow neither with n nor with m. `model(rows)` gives the
    callables of `walk` for some rows, a tensor of indices into the R branches. No reward is waited for before all
    steps are walked. `keep_path` keeps three latents for each step of each branch.
    """
    active = torch.zeros(len(x_t), steps, dtype=torch.bool)
    judged: list[tuple[Tensor, int]] = []  # (rows, k)
    waits: list[Callable[[], Verdict]] = []  # for their rewards
    last_estimate = torch.zeros_like(x_t)
    slices: list[list[Step]] = []
    with beginning(waits):
        for rows in torch.arange(len(x_t)).split(batch_size):
            predict, guide = model(rows)
            slices.append([])
            for k, point in enumerate(walk(predict, schedule, x_t[rows], t[rows], steps, guide)):
                if keep_path:
                    slices[-1].append(point)
                on = rows[point.active.cpu()]
                if not len(on):
                    break
                active[on, k] = True
                last_estimate[on] = point.x0_hat[point.active]
                judged.append((on, k))
                waits.append(judge(last_estimate[on], on))
            if keep_path:  # the last point is one without an active row if the walk ended early
                slices[-1] += [slices[-1][-1]] * (steps - len(slices[-1]))
    path = [Step(*map(torch.cat, zip(*points, strict=True))) for points in zip(*slices, strict=True)]
    return Scores(*_collect(judged, waits, active.shape), active, last_estimate, path)


@torch.no_grad()
def begin_samples(judge: Judge, x_0: Tensor, rows: Tensor, batch_size: int) -> Callable[[], Scores]:
    """Begin to judge R of the clean latents x_0, those of `rows` (R,), `batch_size` at a time.

    What is returned waits for their scores, of one step and without a path.
    """
    active = torch.ones(len(rows), 1, dtype=torch.bool)
    parts, waits = torch.arange(len(rows)).split(batch_size), []
    with beginning(waits):
        for part in parts:
            waits.append(judge(x_0[rows[part]], rows[part]))
    return lambda: Scores(*_collect([(part, 0) for part in parts], waits, active.shape), active, x_0[rows], [])


def _collect(
    judged: Sequence[tuple[Tensor, int]], waits: Sequence[Callable[[], Verdict]], shape: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Wait for the rewards of (rows, step): all of them and their components as tensors of `shape` (R, m)."""
    rewards, components = torch.zeros(shape), {}
    for (rows, k), (total, parts) in zip(judged, wait_for_all(waits), strict=True):
        rewards[rows, k] = total
        for name, values in parts.items():
            components.setdefault(name, torch.full(shape, torch.nan))[rows, k] = values
    return rewards, components


def join_scores(parts: Sequence[Scores], last_estimate: Tensor) -> Scores:
    """The scores of several sets of samples as one; `last_estimate` (R, ...) are those of all of them."""
    names = dict.fromkeys(name for part in parts for name in part.components)
    missing = [torch.full_like(part.rewards, torch.nan) for part in parts]
    components = {
        name: torch.cat([part.components.get(name, nan) for part, nan in zip(parts, missing, strict=True)])
        for name in names
    }
    rewards, active = (torch.cat([getattr(part, name) for part in parts]) for name in ("rewards", "active"))
    return Scores(rewards, components, active, last_estimate, [])


class Selection(NamedTuple):
    """Which branch of each prompt to learn from."""

    branch_reward: Tensor  # (B, n) mean reward over the active steps of each branch; NaN if one of them has none
    scored: Tensor  # (B, n) bool: the branch has a reward and took part
    best: Tensor  # (B,) index in [0, n), among scored branches
    worst: Tensor  # (B,) index in [0, n), among scored branches
    tied: Tensor  # (B,) bool: best and worst earned the same, so the choice says nothing


def select(rewards: Tensor, active: Tensor) -> Selection:
    """Best and worst branch of every prompt (eq. 8), never across prompts; rewards and active are (B, n, m).

    The branches of a prompt share t, hence the number of active steps, so the mean ranks them exactly as the sum does.
    A branch with a reward of NaN (`--reward_failure=skip`) is out of the running. Where all of a prompt's are, `best`
    and `worst` are arbitrary and `scored` says so.
    """
    branch_reward = masked_mean(rewards, active)
    scored = ~branch_reward.isnan()
    as_loser = torch.where(scored, branch_reward, -torch.inf)
    as_winner = torch.where(scored, branch_reward, torch.inf)
    best, worst = as_loser.argmax(1), as_winner.argmin(1)
    tied = scored.any(1) & (as_loser.amax(1) == as_winner.amin(1))
    return Selection(branch_reward, scored, best, worst, tied)


def advantages(selection: Selection) -> Tensor:
    """Each branch's reward by its prompt's own mean and standard deviation, (B, n) in [-5, 5]; 0 without a reward or
    where all of a prompt's branches earn the same."""
    reward, scored = selection.branch_reward, selection.scored
    count = scored.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(scored, reward, 0).sum(1, keepdim=True) / count
    deviation = torch.where(scored, reward - mean, 0)
    spread = (deviation.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(selection.tied[:, None], 0, deviation / spread.clamp(min=1e-8)).clamp(-5, 5)


class Preference(NamedTuple):
    """The loss of B pairs and what it asks of the model's errors."""

    loss: Tensor  # (B,)
    logits: Tensor  # (B,) the argument of the log-sigmoid
    log_ratios: Tensor  # (B, 2) surrogate of log p_theta / p_ref: best, worst
    weights: Tensor  # (B, 2, m) derivative of the mean loss by each error; 0 for a pair that says nothing
