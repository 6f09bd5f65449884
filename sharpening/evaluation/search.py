"""Inference-time search: spend more forwards on an image instead of training the model (what the paper compares with).

Every method is a function of a `Problem` that returns one clean latent per prompt. It asks the reward about decoded
latents and never about gradients. What it cost is counted in the problem: `rows`, samples that passed through the UNet
(guidance makes them two), and `judged`, images that the reward saw. With T sampling steps and no guidance an image
costs T rows without search.

Rows of B prompts with k candidates each are laid out as b * k + i. All noise of a prompt comes from a seed of its own,
so what is found for a prompt does not depend on the others.
"""

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharpening.errors import UserError
from sharpening.trajectory import Model, Schedule, ddim_step, generate

UNSCORED = -1e30  # below any reward, yet finite: weights are computed from it
ModelOf = Callable[[Tensor], Model]
Judge = Callable[[Tensor, Tensor], Tensor]


class Problem:
    """What a search works on, and what it has spent.

    Args:
        model_of: the model of some rows, as `walk` takes it; rows (R,) are indices of prompts.
        judge: `(latents (R, C, h, w), rows (R,)) -> rewards (R,)` float32 on the CPU, higher is better.
        schedule: the sampler's.
        shape: (C, h, w) of a latent.
        seeds: one for each of the B prompts.
        device: where latents live.
        batch_size: rows per forward, and images per call of the judge, at most.
    """

    def __init__(
        self,
        model_of: ModelOf,
        judge: Judge,
        schedule: Schedule,
        shape: Sequence[int],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        batch_size: int = 64,
    ):
        self.model_of, self._judge, self.schedule = model_of, judge, schedule
        self.shape, self.prompts, self.device = tuple(shape), len(seeds), torch.device(device)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.batch_size = batch_size
        self.rows = self.judged = 0

    def noise(self, count: int) -> Tensor:
        """The next Gaussian draws of every prompt's own stream, (B * count, C, h, w)."""
        drawn = [torch.randn(count, *self.shape, generator=generator) for generator in self.generators]
        return torch.cat(drawn).to(self.device)

    def slices(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The B * count rows in slices of `batch_size`: (rows, the prompts of those rows)."""
        prompts = torch.arange(self.prompts).repeat_interleave(count)
        return [(rows, prompts[rows]) for rows in torch.arange(len(prompts)).split(self.batch_size)]

    def counted(self, prompts: Tensor) -> Model:
        """The model of some rows, given by their prompts; what passes through it is counted."""
        model = self.model_of(prompts)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            self.rows += len(x)
            return model.predict(x, t)

        def guide(output: Tensor, x: Tensor, t: Tensor) -> Tensor:
            self.rows += len(x)
            return model.guide(output, x, t)

        return Model(predict, None if model.guide is None else guide)

    def generate(self, noise: Tensor, count: int) -> Tensor:
        """Clean latents of B * count noises by deterministic DDIM."""
        slices = self.slices(count)
        return torch.cat([generate(self.counted(prompts), self.schedule, noise[rows]) for rows, prompts in slices])

    def estimate(self, x: Tensor, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The clean estimate and the noise estimate of B * count states at t (B * count,)."""
        estimates = []
        for rows, prompts in self.slices(count):
            model = self.counted(prompts)
            output = model.predict(x[rows], t[rows])
            if model.guide is not None:
                output = model.guide(output, x[rows], t[rows])
            estimates.append(self.schedule.clean_and_noise(output, x[rows], t[rows]))
        clean, noise = zip(*estimates, strict=True)
        return torch.cat(clean), torch.cat(noise)

    def judge(self, latents: Tensor, count: int) -> Tensor:
        """Rewards (B, count); an image without one is worse than any other."""
        self.judged += len(latents)
        rewards = torch.cat([self._judge(latents[rows], prompts) for rows, prompts in self.slices(count)])
        return rewards.view(self.prompts, count).nan_to_num(nan=UNSCORED)

    def pick(self, candidates: Tensor, choice: Tensor) -> Tensor:
        """Of B * count candidates the chosen one of each prompt, choice (B,)."""
        count = len(candidates) // self.prompts
        return candidates[torch.arange(self.prompts) * count + choice]


def timesteps(problem: Problem, count: int) -> list[Tensor]:
    """The sampler's timesteps, each for B * count rows."""
    rows = problem.prompts * count
    return [torch.full((rows,), t, device=problem.device) for t in problem.schedule.timesteps.tolist()]


@torch.no_grad()
def best_of_n(problem: Problem, n: int) -> Tensor:
    """Draw n images and keep the best (random search in Ma et al., arXiv 2501.09732). Costs n T rows."""
    latents = problem.generate(problem.noise(n), n)
    return problem.pick(latents, problem.judge(latents, n).argmax(1))


@torch.no_grad()
def zero_order(problem: Problem, iterations: int, neighbours: int, radius: float = 0.5) -> Tensor:
    """Move the initial noise to the best of its neighbours, again and again (Ma et al., arXiv 2501.09732).

    A neighbour is `sqrt(1 - radius^2) pivot + radius noise`, which is Gaussian as the pivot is; radius in (0, 1]. The
    pivot stays where no neighbour is better. Costs (1 + iterations * neighbours) T rows.
    """
    pivot = problem.noise(1)
    best = problem.generate(pivot, 1)
    reward = problem.judge(best, 1)[:, 0]
    for _ in range(iterations):
        around = (1 - radius**2) ** 0.5 * pivot.repeat_interleave(neighbours, 0) + radius * problem.noise(neighbours)
        latents = problem.generate(around, neighbours)
        found, choice = problem.judge(latents, neighbours).max(1)
        better = (found > reward).to(problem.device)[:, None, None, None]
        pivot = torch.where(better, problem.pick(around, choice), pivot)
        best = torch.where(better, problem.pick(latents, choice), best)
        reward = torch.maximum(reward, found)
    return best


def _steered(problem: Problem, candidates: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Stochastic sampling in which each step's noise is combined from candidates by the rewards they lead to.

    `combine(noises (B, K, D), rewards (B, K)) -> (B, D)`. A candidate is judged by the clean estimate of the state it
    leads to. The last step, after which nothing is left to estimate, is deterministic. T + (T - 1) K rows.
    """
    x, grid = problem.noise(1), timesteps(problem, 1)
    for t, following in zip(grid, [*grid[1:], None], strict=True):
        x0_hat, eps_hat = problem.estimate(x, t, 1)
        if following is None:
            return ddim_step(problem.schedule, x0_hat, eps_hat, t)
        noises = problem.noise(candidates)
        repeated = (part.repeat_interleave(candidates, 0) for part in (x0_hat, eps_hat, t))
        ahead = ddim_step(problem.schedule, *repeated, noises)
        estimates, _ = problem.estimate(ahead, following.repeat_interleave(candidates), candidates)
        rewards = problem.judge(estimates, candidates).to(problem.device)
        noise = combine(noises.view(problem.prompts, candidates, -1), rewards)
        x = ddim_step(problem.schedule, x0_hat, eps_hat, t, noise.view_as(x))
    raise ValueError("the schedule has no timestep")


@torch.no_grad()
def demon(problem: Problem, candidates: int) -> Tensor:
    """Tanh-Demon (Yeh et al., arXiv 2410.05760): each step's noise is a sum of K noises, weighted by
    `tanh((R - mean) / standard deviation)` of the rewards they lead to, brought back to the length that noise has.

    Differs from the paper in that a candidate is judged by its one-step clean estimate and not by an ODE solved to its
    end. Costs T + (T - 1) K rows.
    """

    def combine(noises: Tensor, rewards: Tensor) -> Tensor:
        rewards = rewards.double()  # UNSCORED squared is beyond float32
        spread = rewards.std(1, keepdim=True, correction=0)
        weights = torch.tanh((rewards - rewards.mean(1, keepdim=True)) / spread.clamp(min=1e-8)).to(noises)
        total = (weights[..., None] * noises).sum(1)
        # Where all earn the same there is nothing to steer by: the first noise as it is.
        total = torch.where(spread > 1e-8, total, noises[:, 0])
        return total * noises.shape[-1] ** 0.5 / total.norm(dim=1, keepdim=True)

    return _steered(problem, candidates, combine)


@torch.no_grad()
def path_integral(problem: Problem, candidates: int, temperature: float = 0.1) -> Tensor:
    """Path-integral control after Free2Guide (Kim et al., arXiv 2411.17041): each step's noise is shifted by the mean
    of K noises under the weights `softmax(R / temperature)` of the rewards they lead to. Costs T + (T - 1) K rows.

    The published method is the limit of temperature 0, the best candidate's noise itself. Here the sum of shift and
    fresh noise is brought back to the variance of noise.
    """

    def combine(noises: Tensor, rewards: Tensor) -> Tensor:
        weights = torch.softmax(rewards / temperature, 1)
        shifted = (weights[..., None] * noises).sum(1) + problem.noise(1).flatten(1)
        return shifted / (1 + weights.square().sum(1, keepdim=True)).sqrt()

    return _steered(problem, candidates, combine)


@torch.no_grad()
def smc(problem: Problem, particles: int, temperature: float = 0.1) -> Tensor:
    """Feynman-Kac steering (Singhal et al., arXiv 2501.06848), a particle filter: n stochastic samples, resampled by
    `exp((R_t - R_before) / temperature)` of their clean estimates whenever fewer than half of them carry the weight.

    Returns the best particle of each prompt. Costs n T rows.
    """
    x, before = problem.noise(particles), torch.zeros(problem.prompts, particles)
    log_weights = torch.zeros(problem.prompts, particles)
    grid = timesteps(problem, particles)
    for index, t in enumerate(grid):
        x0_hat, eps_hat = problem.estimate(x, t, particles)
        rewards = problem.judge(x0_hat, particles)
        if index == len(grid) - 1:
            return problem.pick(ddim_step(problem.schedule, x0_hat, eps_hat, t), rewards.argmax(1))
        log_weights = log_weights + (rewards - before) / temperature
        weights = torch.softmax(log_weights, 1)
        ancestors = torch.arange(particles).repeat(problem.prompts, 1)
        for prompt in (1 / weights.square().sum(1) < particles / 2).nonzero().flatten().tolist():
            # Systematic resampling: one uniform number places n equally spaced pointers.
            start = torch.rand(1, generator=problem.generators[prompt])
            pointers = (torch.arange(particles) + start) / particles
            ancestors[prompt] = torch.searchsorted(weights[prompt].cumsum(0), pointers).clamp(max=particles - 1)
            log_weights[prompt] = 0
        before = rewards.gather(1, ancestors)
        rows = (torch.arange(problem.prompts)[:, None] * particles + ancestors).flatten()
        x = ddim_step(problem.schedule, x0_hat[rows], eps_hat[rows], t, problem.noise(particles))
    raise ValueError("the schedule has no timestep")


METHODS: dict[str, Callable[..., Tensor]] = {
    "best_of_n": best_of_n,
    "zero_order": zero_order,
    "demon": demon,
    "path_integral": path_integral,
    "smc": smc,
}


def parse(spec: str) -> tuple[str, list[int | float]]:
    """A search and its arguments after the problem, of a spec such as `best_of_n:8`, `zero_order:3:4` or `smc:8:0.05`.

    Raises:
        UserError: naming the spec and the remedy.
    """
    name, *words = spec.split(":")
    if name not in METHODS:
        raise UserError(f"--models ...@{spec}: there is no search {name}; choose one of {', '.join(METHODS)}")
    parameters = list(inspect.signature(METHODS[name]).parameters.values())[1:]
    kinds = [{"int": int, "float": float}[str(parameter.annotation.__name__)] for parameter in parameters]
    required = sum(parameter.default is inspect.Parameter.empty for parameter in parameters)
    form = ":".join([name, *(parameter.name for parameter in parameters)])
    try:
        values = [kind(word) for kind, word in zip(kinds, words, strict=False)]
    except ValueError:
        values = []
    positive = all(math.isfinite(value) and value > 0 for value in values)
    if not required <= len(values) == len(words) or not positive:
        raise UserError(f"--models ...@{spec} must be {form}, numbers above 0, the last ones optional")
    if name == "zero_order" and len(values) == 3 and values[2] > 1:
        raise UserError(f"--models ...@{spec}: the radius must lie in (0, 1]")
    return name, values
