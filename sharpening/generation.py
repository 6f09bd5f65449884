"""Latents that a model generates, and what of them outlives the optimizer step that made them."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharpening.draws import draw_noise
from sharpening.progress import progress
from sharpening.sdxl import Denoiser
from sharpening.selection import Judge, ModelOf, Scores, Verdict, begin_samples
from sharpening.trajectory import Schedule, generate
from sharpening.transfer import Agree, alone, slices, upload
from sharpening.waiting import beginning, wait_for_all

logger = logging.getLogger(__name__)


@torch.no_grad()
def generate_in_slices(
    model_of: ModelOf, schedule: Schedule, noise: Tensor, batch_size: int, count: int = 0
) -> Tensor:
    """Clean latents (R, ...) of Gaussian noise (R, ...), `batch_size` at a time. Where `count` slices are more than
    that, the first is generated again for the rest, and thrown away."""
    parts = [*slices(len(noise), batch_size)]
    again = parts[:1] * (count - len(parts))
    bar = progress(parts + again, desc="generating", unit="slice", leave=False, delay=2)
    made = [generate(model_of(rows), schedule, noise[rows]) for rows in bar]
    return torch.cat(made[: len(parts)])


class Generation:
    """The generation under way, for all optimizer steps that it serves.

    Attributes:
        batch: its prompts, collated rows of `CachedData`; empty before the first.
        made: `[{"prompts": list[str], "latents": Tensor}]` once there are latents. A checkpoint keeps this list as it
            is: the weights that made the latents are gone.
        scores: of the latents, once they were judged.
    """

    def __init__(self) -> None:
        self.batch: Mapping[str, Any] = {}
        self.made: list[dict[str, Any]] = []
        self.scores: Scores | None = None

    def begin(self, batch: Mapping[str, Any], shape: Sequence[int]) -> bool:
        """Take up new prompts; returns whether `made`, read from a checkpoint, are latents of `shape` for them.

        Latents that are for others are warned of: the run will not be the one that was interrupted.
        """
        self.batch, self.scores = batch, None
        made = [(entry["prompts"], tuple(entry["latents"].shape)) for entry in self.made]
        fits = made == [(batch["caption"], tuple(shape))]
        if made and not fits:
            logger.warning(
                "the latents that the checkpoint keeps (--generation_reuse) do not fit this step's prompts and are "
                "generated anew: the resumed run differs from one that was never interrupted"
            )
        return fits

    def keep(self, latents: Tensor) -> None:
        """Keep the latents of the prompts."""
        self.made[:] = [{"prompts": list(self.batch["caption"]), "latents": latents}]

    @property
    def latents(self) -> Tensor:
        """What was made."""
        return self.made[0]["latents"]


class SampleSets:
    """Samples of a model that does not change, n for each prompt and set: drawn once, judged once, kept.

    A prompt's noise does not depend on when it is drawn or on its neighbours in a batch, so after a resumption its
    samples are drawn again as they were, up to the rounding of batches of other sizes.
    """

    def __init__(self, sets: int, rows: int, n: int, shape: Sequence[int], seed: int) -> None:
        """A prompt gets its next one of `sets` sets whenever all `rows` of the data have been drawn; samples are
        latents of `shape` (4, h, w)."""
        self.sets, self.rows, self.n, self.shape, self.seed = sets, rows, n, shape, seed
        self.round = 0
        self._latents: dict[str, Tensor] = {}  # by key, (n, 4, h, w) on the CPU
        self._scores: dict[str, Scores] = {}  # by key, of n samples

    def begin_round(self, number: int) -> None:
        """Forget all samples if the round is another one: another model draws its."""
        if number != self.round:
            self.round = number
            self._latents.clear()
            self._scores.clear()

    def keys(self, draws: Sequence[int], prompts: Sequence[str]) -> list[str]:
        """What names the samples of each draw."""
        of_round = f"round {self.round}/" if self.round else ""
        sets = [draw // self.rows % self.sets for draw in draws]
        return [f"{of_round}{number}/{prompt}" for number, prompt in zip(sets, prompts, strict=True)]

    def draw(
        self, keys: Sequence[str], denoiser: Denoiser, schedule: Schedule, batch_size: int, agree: Agree = alone
    ) -> None:
        """Draw the samples of B keys that are not there yet, all together, `batch_size` at a time; denoiser is of B
        rows. There are as many slices as `agree`, as of `Run.same_forwards`, says."""
        missing = {key: row for row, key in enumerate(keys) if key not in self._latents}
        count = agree(math.ceil(len(missing) * self.n / batch_size))
        if count == 0:
            return
        drawn = missing or {keys[0]: 0}  # for the other processes alone
        noise = draw_noise(self.seed, [*drawn], self.n, self.shape).flatten(0, 1)  # of each key by itself
        of_rows = torch.tensor([*drawn.values()]).repeat_interleave(self.n)
        latents = generate_in_slices(
            lambda rows: denoiser.rows(of_rows[rows]), schedule, upload(noise, denoiser.condition.pooled.device),
            batch_size, count,
        )  # fmt: skip
        if missing:
            self._latents |= zip(missing, latents.cpu().unflatten(0, (-1, self.n)), strict=True)

    def judge(self, keys: Sequence[str], judge: Judge, batch_size: int) -> None:
        """Judge the samples of each of B keys, by itself, unless all of them have a score already.

        `judge(latents, rows)` is told the rows of B * n samples, of which n follow each other for each key.
        """
        begun: dict[str, Callable[[], Scores]] = {}
        with beginning(begun.values()):
            for first, key in zip(range(0, len(keys) * self.n, self.n), keys, strict=True):
                if key in begun or (key in self._scores and not self._scores[key].rewards.isnan().any()):
                    continue
                of_key = partial(_judge_from, judge, first)
                begun[key] = begin_samples(of_key, self._latents[key], batch_size)
        for key, scores in zip(begun, wait_for_all([*begun.values()]), strict=True):
            self._scores[key] = scores

    def latents(self, keys: Sequence[str]) -> Tensor:
        """The samples (B * n, 4, h, w) of B keys, on the CPU."""
        return torch.cat([self._latents[key] for key in keys])

    def scores(self, keys: Sequence[str]) -> Scores:
        """The scores of the samples of B keys."""
        parts = [self._scores[key] for key in keys]
        missing = [torch.full_like(part.rewards, torch.nan) for part in parts]
        names = dict.fromkeys(name for part in parts for name in part.components)
        components = {
            name: torch.cat([part.components.get(name, nan) for part, nan in zip(parts, missing, strict=True)])
            for name in names
        }
        rewards, active = (torch.cat([getattr(part, name) for part in parts]) for name in ("rewards", "active"))
        return Scores(rewards, components, active, self.latents(keys))


def _judge_from(judge: Judge, first: int, latents: Tensor, rows: list[int]) -> Callable[[], Verdict]:
    """`judge` on rows that are counted from `first`."""
    return judge(latents, [row + first for row in rows])
