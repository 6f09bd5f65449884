"""The methods of table 1, and what of each is tuned: each gets seven runs, or six where it has less to tune."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from study.cost import BEST_OF_N, D3PO, DDPO, DPO, RLHF, SFT
from study.settings import DRAWN, EFFICIENT, IMAGES, LETTER, PAIRS, PAIRS_OF_PATHS, PATHS, PLAIN, SHARPENED, short

ALL_TIMESTEPS = {"timestep_bias_strategy": "none"}
HIGH_NOISE = {"timestep_bias_strategy": "range", "timestep_bias_begin": 400, "timestep_bias_multiplier": 1000.0}


@dataclass(frozen=True)
class Setting:
    """How a method runs, and how it is called: by its learning rate, its timesteps (None: no choice), its branches."""

    rate: float
    high_noise: bool | None
    n: int
    flags: Mapping[str, object] = field(hash=False)

    @property
    def name(self) -> str:
        """Part of an identifier."""
        return f"{short(self.rate)}{'_high' if self.high_noise else ''}_n{self.n}"

    @property
    def words(self) -> str:
        """For a table."""
        timesteps = {None: "", False: "all timesteps, ", True: "timesteps from 400, "}[self.high_noise]
        return f"lr {self.rate:.2g}, {timesteps}n = {self.n}"


@dataclass(frozen=True)
class Method:
    """A row of table 1.

    Attributes:
        name: part of an identifier.
        script: its path without .py.
        flags: its setting, the learning rate among them, before anything is tuned.
        other_n: another number of branches that is tried; 0: none, it has no branches.
        high_noise: whether it learns at timesteps from 400, before anything is tuned; None: its timesteps are those of
            its paths and cannot be chosen.
        keeps: it draws sets of samples once, of which there are more the more is spent, and takes this share of them.
    """

    name: str
    script: str
    flags: Mapping[str, object]
    other_n: int
    high_noise: bool | None = False
    keeps: float = 0.0

    def settings(self, factors: Sequence[float]) -> Iterator[Setting]:
        """What is tried: the learning rate times `factors` at all timesteps and at high noise, or, where those cannot
        be chosen, with both numbers of branches; and the other number of branches by itself."""
        n, rate = self.flags["num_noisy_latents"], self.flags["learning_rate"]
        if self.high_noise is None:
            tried = [(rate * factor, None, count) for count in (n, self.other_n) for factor in factors]
        else:
            tried = [(rate * factor, high, n) for high in (False, True) for factor in factors]
            tried += [(rate, self.high_noise, self.other_n)] if self.other_n else []
        for changed, high, count in tried:
            timesteps = {} if high is None else HIGH_NOISE if high else ALL_TIMESTEPS
            flags = {**self.flags, **timesteps, "learning_rate": changed, "num_noisy_latents": count}
            yield Setting(changed, high, count, flags)

    def untuned(self) -> Setting:
        """The setting before anything is tuned."""
        first = (setting for setting in self.settings([1.0]) if setting.high_noise == self.high_noise)
        return next(first)


EFFICIENT_RLHF, ON_IMAGES = "RLHF sharpening, --preset efficient", "SFT sharpening"
THE_LETTER = "RLHF sharpening, the paper's letter"
METHODS = {
    "standard fine-tuning": Method("fine_tuning", SFT, {**IMAGES, **PLAIN}, 0),
    "best of n of the base, fine-tuning": Method(
        "best_of_base", BEST_OF_N, {**DRAWN, "samples_of": "base", "learning_rate": 5e-4}, 8, keeps=1.0
    ),
    "best of n of its own, fine-tuning": Method("best_of_own", BEST_OF_N, {**DRAWN, "learning_rate": 1e-5}, 8),
    "Diffusion-DPO, fixed pairs": Method("dpo", DPO, PAIRS, 8, keeps=1.0),
    "Diffusion-DPO in 3 rounds (as IterPO)": Method("dpo_rounds", DPO, {**PAIRS, "rounds": 3}, 8, keeps=1 / 3),
    "policy gradient (DDPO)": Method("ddpo", DDPO, PATHS, 8, None),
    "D3PO, best and worst of n paths": Method("d3po", D3PO, PAIRS_OF_PATHS, 8, None),
    ON_IMAGES: Method("sft", SFT, {**IMAGES, **SHARPENED}, 2),
    THE_LETTER: Method("rlhf_letter", RLHF, LETTER, 8),
    EFFICIENT_RLHF: Method("rlhf_efficient", RLHF, EFFICIENT, 4, True),
}
