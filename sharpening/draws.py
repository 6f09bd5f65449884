"""Randomness by counting: which row, noise and timestep every draw of a run gets.

A draw is one row shown to the model once; draws are numbered 0, 1, 2, ... over the whole run, whatever the number of
processes or workers, and however a step is accumulated. Everything random about a draw comes from its number and the
run's seed, so a resumed run, two processes, or eight accumulated batches of one see exactly what one uninterrupted
process would.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler


def draw_generator(seed: int, draw: int | str, stream: str) -> torch.Generator:
    """A CPU generator for one purpose (`stream`) of one draw; independent of every other purpose and draw."""
    digest = hashlib.blake2b(f"{seed}/{draw}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class DrawSampler(Sampler):
    """Batches of (row, draw number) for one rank, from optimizer step `start_step` up to `num_steps`.

    Draw g shows row `permutation_e[g % num_rows]` of epoch `e = g // num_rows`, so batches straddle epochs and no row
    is dropped. Optimizer step s consists of draws [s * E, (s + 1) * E), E = batch_size * world_size, of which a rank
    has `batch_size` neighbours: which rows train together depends on E alone.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int,
        num_steps: int,
    ):
        self.num_rows, self.batch_size, self.rank, self.world_size = num_rows, batch_size, rank, world_size
        self.seed = seed
        self.steps = range(start_step, num_steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, permutation = -1, torch.empty(0)
        for step in self.steps:
            first = (step * self.world_size + self.rank) * self.batch_size
            batch = []
            for draw in range(first, first + self.batch_size):
                if draw // self.num_rows != epoch:
                    epoch = draw // self.num_rows
                    permutation = torch.randperm(
                        self.num_rows, generator=draw_generator(self.seed, epoch, "permutation")
                    )
                batch.append((int(permutation[draw % self.num_rows]), draw))
            yield batch


class Noising(NamedTuple):
    """What is random about a batch of B prompts with n branches each."""

    eps: Tensor  # (B, n, C, h, w) float32 noise
    t: Tensor  # (B,) int64 first timestep, shared by the branches of a prompt
    dropped: Tensor  # (B,) bool: train this draw without its prompt


@dataclass(frozen=True)
class Draws:
    """The random settings of a run.

    Attributes:
        seed: of every draw.
        probabilities: (T,) those of the first timestep.
        noise_offset: scale of a constant that is added to every channel of a noise.
        drop: the probability that a draw is trained on without its prompt.
    """

    seed: int
    probabilities: Tensor
    noise_offset: float = 0.0
    drop: float = 0.0

    def noising(self, draws: Sequence[int], n: int, shape: Sequence[int]) -> Noising:
        """n noises of `shape` (C, h, w) and one t per draw (algorithm 1, line 3); whether its prompt is dropped."""
        eps, t, dropped = [], [], []
        for draw in draws:
            noise_generator = draw_generator(self.seed, int(draw), "noise")
            noise = torch.randn(n, *shape, generator=noise_generator)
            if self.noise_offset:
                noise = noise + self.noise_offset * torch.randn(n, shape[0], 1, 1, generator=noise_generator)
            eps.append(noise)
            of_t = draw_generator(self.seed, int(draw), "timestep")
            t.append(torch.multinomial(self.probabilities, 1, generator=of_t))
            chance = torch.rand(1, generator=draw_generator(self.seed, int(draw), "prompt dropping"))
            dropped.append(chance < self.drop)
        return Noising(torch.stack(eps), torch.cat(t), torch.cat(dropped))


def draw_noise(seed: int, keys: Sequence[int | str], count: int, shape: Sequence[int]) -> Tensor:
    """Gaussian noise to generate `count` latents of `shape` (C, h, w) per key from: (B, count, C, h, w) float32.

    A key is a draw's number, or a prompt, which then gets the same noise whenever it is drawn.
    """
    generators = [draw_generator(seed, key, "generation") for key in keys]
    return torch.stack([torch.randn(count, *shape, generator=generator) for generator in generators])


def draw_paths(
    seed: int, draws: Sequence[int], n: int, shape: Sequence[int], steps: int, kept: int = 0
) -> tuple[Tensor, Tensor]:
    """What is random along n stochastic sampling paths of `steps` steps per draw.

    Returns the noise of all steps but the last, (B * n, steps - 1, C, h, w) float32, and `kept` different ones of
    those steps for each path, (B * n, kept) int64.
    """
    noises, indices = [], []
    for draw in draws:
        generator = draw_generator(seed, int(draw), "path")
        noises.append(torch.randn(n, steps - 1, *shape, generator=generator))
        indices += [torch.randperm(steps - 1, generator=generator)[:kept] for _ in range(n)]
    return torch.cat(noises), torch.stack(indices)


def timestep_probabilities(
    num_train_timesteps: int,
    strategy: str = "none",
    multiplier: float = 1.0,
    portion: float = 0.25,
    begin: int = 0,
    end: int = 1000,
) -> Tensor:
    """Probabilities (T,) of a branch's first timestep, from the `--timestep_bias_*` flags.

    "later" favours the last `portion` of [0, T), the noisy end; "earlier" the first; "range" is [begin, end).
    """
    weights = torch.ones(num_train_timesteps)
    count = int(portion * num_train_timesteps)
    favoured = {
        "none": slice(0, 0),
        "earlier": slice(0, count),
        "later": slice(num_train_timesteps - count, num_train_timesteps),
        "range": slice(begin, end),
    }[strategy]
    weights[favoured] *= multiplier
    return weights / weights.sum()
