"""The runs of the study (`study/execution.py`): every training run of the paper's comparisons.

Compute is counted as `study/cost.py` says. Where methods are compared at equal compute, the number of updates follows
from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from study.cost import BEST_OF_N, D3PO, DDPO, DPO, MODEL, RLHF, SFT, compute_before, compute_per_update
from study.settings import (
    COMMON,
    DATA,
    DRAWN,
    FROM_UPDATES,
    IMAGES,
    LETTER,
    ON_IMAGES,
    ON_SAMPLES,
    PAIRS,
    PAIRS_OF_PATHS,
    PATHS,
    PLAIN,
    SAMPLES,
    SFT_NAME,
    SHARPENED,
    SHOWN_OVER_TIME,
    THE_LETTER,
    Size,
    short,
)


@dataclass(frozen=True)
class Run:
    """A training run: `updates` optimizer steps of a script."""

    name: str
    script: str  # its path without .py
    updates: int
    seed: int
    flags: Mapping[str, object] = field(hash=False)
    compute: float = 0.0  # forwards of a row

    @property
    def key(self) -> str:
        return f"{self.name}_s{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A flag varied over values, at equal updates: the runs by value and seed."""

    title: str
    flag: str
    runs: Mapping[int, Sequence[Run]]


@dataclass(frozen=True)
class Plan:
    """Every run by where it appears."""

    table_1: Mapping[str, Sequence[Run]]  # label -> a run per seed
    settle: Mapping[tuple[float, str], Sequence[Run]]  # (learning rate, label) -> a run per seed
    sweeps: Sequence[Sweep]
    selection: Mapping[tuple[str, str], Sequence[Run]]  # (label, data) -> a run per seed
    rates: Mapping[str, Sequence[Run]]  # label of table 1 -> a run at a third and at three times its learning rate
    searches: Mapping[str, Sequence[str]]  # label -> specs of increasing cost

    def runs(self) -> list[Run]:
        groups = [*self.table_1.values(), *self.settle.values(), *self.selection.values(), *self.rates.values()]
        groups += [runs for sweep in self.sweeps for runs in sweep.runs.values()]
        return list({run.key: run for runs in groups for run in runs}.values())

    def groups(self) -> dict[str, list[Run]]:
        """Which runs are judged together: at most 7 of one seed, those of table 1 by themselves."""
        runs = self.runs()
        first = {run.key for rows in self.table_1.values() for run in rows}
        groups: dict[str, list[Run]] = {}
        for seed in dict.fromkeys(run.seed for run in runs):
            groups[f"table1_s{seed}"] = [run for run in runs if run.seed == seed and run.key in first]
            others = [run for run in runs if run.seed == seed and run.key not in first]
            for start in range(0, len(others), 7):
                groups[f"others_s{seed}_{start // 7}"] = others[start : start + 7]
        return groups

    def search_specs(self) -> list[tuple[str, str, str, bool]]:
        """(group, model name, spec, whether the RLHF model is searched) of every search at inference."""
        found = []
        for label, specs in self.searches.items():
            group = f"search_{specs[0].partition(':')[0]}"
            found += [(group, spec.replace(":", "_"), spec, False) for spec in specs]
            if label == "best of n":
                found += [(group, f"{spec.replace(':', '_')}_on_rlhf", spec, True) for spec in specs[:2]]
        return found


@dataclass(frozen=True)
class Planner:
    """Makes the runs of a study of one size, whose data lie in `output_dir`.

    Attributes:
        decode: what decoding a latent costs, in forwards of a row.
    """

    size: Size
    output_dir: Path
    decode: float

    @cached_property
    def common(self) -> dict[str, object]:
        """Flags of every run."""
        return {
            **COMMON,
            "pretrained_model_name_or_path": MODEL,
            "cache_dir": self.output_dir / "cache",
            "train_batch_size": self.size.batch,
            "validation_prompts_file": self.output_dir / "held_out_prompts.txt",
        }

    @cached_property
    def of_images(self) -> dict[str, object]:
        """Flags of a run on captioned images."""
        return {**self.common, **IMAGES, "train_data_dir": self.output_dir / "shapes"}

    @cached_property
    def of_prompts(self) -> dict[str, object]:
        """Flags of a run on prompts."""
        return {**self.common, "prompts_file": self.output_dir / "prompts.txt"}

    def run(self, name: str, script: str, seed: int, updates: int | None = None, **flags: object) -> Run:
        """A run; without `updates`, as many as `size.compute` allows."""
        flags = {**(self.of_images if script == SFT else self.of_prompts), **flags}
        each, before = compute_per_update(script, flags, self.decode), compute_before(script, flags, self.decode)
        rounds = flags.get("rounds", 1)  # each warms up anew
        updates = updates or rounds * max(2, int((self.size.compute - before) / each / rounds))
        flags |= {
            "lr_warmup_steps": max(1, updates // rounds // 10),
            "num_validation_images": self.size.validation_images,
            "validation_steps": max(1, updates // 6) if seed == 0 and name in SHOWN_OVER_TIME else 0,
        }
        return Run(name, script, updates, seed, flags, before + updates * each)

    def per_seed(self, name: str, script: str, seeds: Sequence[int] | None = None, **options: object) -> list[Run]:
        """The same run with each seed; `options` are those of `run`."""
        return [self.run(name, script, seed, **options) for seed in seeds or self.size.seeds]

    def table_1(self) -> dict[str, list[Run]]:
        """Every method at equal compute."""
        sets = self.size.reference_sets
        dpo, in_rounds = {**PAIRS, "sets": sets}, {**PAIRS, "sets": max(1, sets // 3), "rounds": 3}
        best_of_base = {**DRAWN, "samples_of": "base", "sets": sets, "learning_rate": 5e-4}
        best_of_own = {**DRAWN, "learning_rate": 1e-5}
        return {
            "standard fine-tuning": self.per_seed("table1_fine_tuning", SFT, **PLAIN),
            "best of 4 of the base, fine-tuning": self.per_seed("table1_best_of_base", BEST_OF_N, **best_of_base),
            "best of 4 of its own, fine-tuning": self.per_seed("table1_best_of_own", BEST_OF_N, **best_of_own),
            "Diffusion-DPO, fixed pairs": self.per_seed("table1_dpo", DPO, **dpo),
            "Diffusion-DPO in 3 rounds (as IterPO)": self.per_seed("table1_dpo_rounds", DPO, **in_rounds),
            "policy gradient (DDPO)": self.per_seed("table1_ddpo", DDPO, **PATHS),
            "D3PO, best and worst of 4 paths": self.per_seed("table1_d3po", D3PO, **PAIRS_OF_PATHS),
            ON_IMAGES: self.per_seed("table1_sft", SFT, **SHARPENED),
            THE_LETTER: self.per_seed("table1_rlhf_letter", RLHF, **LETTER),
            ON_SAMPLES: self.per_seed("table1_rlhf", RLHF, **SAMPLES),
        }

    def settle(self) -> dict[tuple[float, str], list[Run]]:
        """SFT sharpening against standard fine-tuning, at equal updates and at equal compute."""
        settle, plain = {}, compute_per_update(SFT, {**self.of_images, **PLAIN}, self.decode)
        for rate in self.size.learning_rates:
            name, options = f"sft_{short(rate)}", {"learning_rate": rate, "updates": self.size.updates}
            sharpened = self.per_seed(f"{name}_n3_m3", SFT, **SHARPENED, **options)
            settle[rate, "SFT sharpening, n = m = 3"] = sharpened
            settle[rate, "fine-tuning, equal updates"] = self.per_seed(f"{name}_n1_m1", SFT, **PLAIN, **options)
            options["updates"] = round(sharpened[0].compute / plain)
            settle[rate, "fine-tuning, equal compute"] = self.per_seed(f"{name}_n1_m1_long", SFT, **PLAIN, **options)
        return settle

    def sft(self, n: int, m: int, seeds: Sequence[int], reward: str = "shapes", data: str = "shapes") -> list[Run]:
        """SFT with n branches of m steps."""
        name = f"{SFT_NAME}_n{n}_m{m}" + ("" if reward == "shapes" else "_worst")
        name += "" if data == "shapes" else f"_{data}"
        flags = {"num_noisy_latents": n, "trajectory_nums": m, "reward_model": reward}
        flags["train_data_dir"] = self.output_dir / data
        return self.per_seed(name, SFT, seeds, updates=self.size.updates, **flags)

    def rlhf(self, n: int, m: int) -> list[Run]:
        """RLHF on samples with n branches of m steps, first seed only."""
        flags = {**SAMPLES, "num_noisy_latents": n, "trajectory_nums": m}
        updates = self.size.preference_updates
        return self.per_seed(f"rlhf_n{n}_m{m}", RLHF, self.size.seeds[:1], updates=updates, **flags)

    def sweeps(self) -> list[Sweep]:
        """The number of branches and of steps."""
        values, seeds = self.size.sweep, self.size.seeds
        n = 3 if 3 in values else 2
        return [
            Sweep("SFT, branches n (m = 1)", "n", {v: self.sft(v, 1, seeds) for v in values}),
            Sweep("RLHF on samples, branches n (m = 1)", "n", {v: self.rlhf(v, 1) for v in values if v > 1}),
            Sweep(f"SFT, steps m (n = {n})", "m", {v: self.sft(n, v, seeds[:1]) for v in values}),
            Sweep(f"RLHF on samples, steps m (n = {n})", "m", {v: self.rlhf(n, v) for v in values}),
        ]

    def selection(self) -> dict[tuple[str, str], list[Run]]:
        """The best and the worst of several noises, on right and on partly wrong captions."""
        selection, seeds = {}, self.size.seeds
        for data in DATA:
            selection["one noise", data] = self.sft(1, 1, seeds, data=data)
            for n in [n for n in self.size.sweep if n in (3, 8)] or [2]:
                selection[f"best of {n} noises", data] = self.sft(n, 1, seeds, data=data)
                # A negative weight turns the reward round.
                selection[f"worst of {n} noises", data] = self.sft(n, 1, seeds, "shapes:-1", data=data)
        return selection

    def rates(self, table_1: Mapping[str, Sequence[Run]]) -> dict[str, list[Run]]:
        """The methods of table 1 at a third and at three times their learning rate, first seed only."""
        rates = {}
        # Settings on given images have a comparison of their own.
        rated = [(label, first) for label, (first, *_) in table_1.items() if first.script != SFT]
        for label, first in rated[: self.size.rated]:
            flags = {name: value for name, value in first.flags.items() if name not in FROM_UPDATES}
            rate = flags.pop("learning_rate")
            rates[label] = [
                self.run(f"{word}_{first.name}", first.script, first.seed, learning_rate=changed, **flags)
                for word, changed in (("low", rate / 3), ("high", rate * 3))
            ]
        return rates

    def searches(self) -> dict[str, list[str]]:
        """Search at inference, instead of training."""
        search = self.size.search
        return {
            "best of n": [f"best_of_n:{k}" for k in search],
            "zero order": [f"zero_order:{k}:{k + 1}" for k in range(1, len(search) + 1)],
            "Demon": [f"demon:{k}" for k in search],
            "path integral": [f"path_integral:{k}" for k in search],
            "SMC": [f"smc:{k}" for k in search],
        }


def make_plan(size: Size, output_dir: Path, decode: float) -> Plan:
    """All runs of the study; `decode` as of `Planner`."""
    planner = Planner(size, output_dir, decode)
    table_1 = planner.table_1()
    return Plan(
        table_1, planner.settle(), planner.sweeps(), planner.selection(), planner.rates(table_1), planner.searches()
    )
