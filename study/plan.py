"""The runs of the study (`study/execution.py`): every training run of the paper's comparisons.

Compute is planned as `study/cost.py` says. Where methods are compared at equal compute, the number of updates follows
from it. Table 1 trains on 36 prompts, chooses settings by nine others and judges by nine that nothing was chosen by;
the comparisons at equal updates, of which nothing is chosen, train on 45 and judge by nine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from study.cost import MODEL, RLHF, SFT, compute, compute_per_update, updates_within
from study.methods import METHODS, Method, Setting
from study.settings import COMMON, DATA, IMAGES, PLAIN, SAMPLES, SFT_NAME, SHARPENED, SHOWN_OVER_TIME, Size, short


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


def _sevens(name: str, runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups of 7 runs: a process each judges them, and draws the base's images once."""
    return {f"{name}_{start // 7}": [*runs[start : start + 7]] for start in range(0, len(runs), 7)}


def groups_of(groups: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """The group of every run, by its key."""
    return {run.key: group for group, runs in groups.items() for run in runs}


@dataclass(frozen=True)
class Tuning:
    """What was tried for every method of table 1, at the smallest budget and the first seed."""

    tried: Mapping[str, Mapping[Setting, Run]]  # label -> setting -> its run

    def runs(self) -> list[Run]:
        return [run for of_method in self.tried.values() for run in of_method.values()]

    def groups(self) -> dict[str, list[Run]]:
        """Which runs are judged together."""
        return _sevens("tuning", self.runs())


@dataclass(frozen=True)
class Plan:
    """Every run by where it appears, but for those of `Tuning` alone."""

    table_1: Mapping[int, Mapping[str, Sequence[Run]]]  # budget -> label -> a run per seed
    sft_against_fine_tuning: Mapping[tuple[float, str], Sequence[Run]]  # (learning rate, label) -> a run per seed
    sweeps: Sequence[Sweep]
    selection: Mapping[tuple[str, str], Sequence[Run]]  # (label, data) -> a run per seed
    searches: Mapping[str, Sequence[str]]  # label -> specs of increasing cost

    @property
    def largest(self) -> Mapping[str, Sequence[Run]]:
        """Table 1 at its largest budget."""
        return self.table_1[max(self.table_1)]

    def first_runs(self) -> list[Run]:
        """The runs of table 1."""
        return [run for rows in self.table_1.values() for runs in rows.values() for run in runs]

    def other_runs(self) -> list[Run]:
        """The runs of all else."""
        groups = [*self.sft_against_fine_tuning.values(), *self.selection.values()]
        groups += [runs for sweep in self.sweeps for runs in sweep.runs.values()]
        return list({run.key: run for runs in groups for run in runs}.values())

    def first_groups(self) -> dict[str, list[Run]]:
        """Which runs of table 1 are judged together: those of one budget and seed."""
        groups: dict[str, list[Run]] = {}
        for budget, rows in self.table_1.items():
            for run in (run for runs in rows.values() for run in runs):
                groups.setdefault(f"table1_{budget // 1000}k_s{run.seed}", []).append(run)
        return groups

    def other_groups(self) -> dict[str, list[Run]]:
        """Which of the others are judged together: at most 7 of one seed."""
        groups, runs = {}, self.other_runs()
        for seed in dict.fromkeys(run.seed for run in runs):
            groups |= _sevens(f"others_s{seed}", [run for run in runs if run.seed == seed])
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

    def run(
        self, name: str, script: str, seed: int, updates: int = 0, budget: int = 0, shown: int = 0, **flags: object
    ) -> Run:
        """A run of so many `updates` or, if that is 0, as many as `budget` allows; held-out images are drawn in it
        `shown` times."""
        flags = {**(self.of_images if script == SFT else self.of_prompts), **flags}
        rounds = flags.get("rounds", 1)  # each warms up anew
        updates = updates or updates_within(budget, script, flags, self.decode, rounds)
        shown = shown or (6 if seed == 0 and name in SHOWN_OVER_TIME else 0)
        flags = {
            "num_validation_images": self.size.validation_images, **flags,
            "lr_warmup_steps": max(1, updates // rounds // 10),
            "validation_steps": max(1, updates // shown) if shown else 0,
        }  # fmt: skip
        return Run(name, script, updates, seed, flags, compute(script, flags, self.decode, updates))

    def per_seed(self, name: str, script: str, seeds: Sequence[int] | None = None, **options: object) -> list[Run]:
        """The same run with each seed; `options` are those of `run`."""
        return [self.run(name, script, seed, **options) for seed in seeds or self.size.seeds]

    def of_table_1(self, method: Method, setting: Setting, budget: int, seed: int) -> Run:
        """A method in a setting, on table 1's prompts; the first seed of the largest budget is shown over time."""
        shown = 10 if budget == max(self.size.budgets) and seed == self.size.seeds[0] else 0
        flags = {**setting.flags, "validation_prompts_file": self.output_dir / "judged_prompts.txt"}
        if method.script == SFT:
            flags["train_data_dir"] = self.output_dir / "shapes_study"
        else:
            flags["prompts_file"] = self.output_dir / "study_prompts.txt"
        if method.keeps:
            share = method.keeps * budget / max(self.size.budgets)
            flags["sets"] = max(1, round(self.size.reference_sets * share))
        if shown:  # as models are judged, however a method samples in training
            flags |= {"num_validation_images": self.size.shown_images, "validation_infer_steps": 25}
        name = f"{method.name}_{setting.name}_{budget // 1000}k"
        return self.run(name, method.script, seed, budget=budget, shown=shown, **flags)

    def tuning(self) -> Tuning:
        """What is tried for every method."""
        tried, budget, seed = {}, min(self.size.budgets), self.size.seeds[0]
        for index, (label, method) in enumerate(METHODS.items()):
            settings = [method.untuned()]
            if self.size.tuned is None or index < self.size.tuned:
                settings = [*method.settings(self.size.rate_factors)]
            tried[label] = {setting: self.of_table_1(method, setting, budget, seed) for setting in settings}
        return Tuning(tried)

    def table_1(self, chosen: Mapping[str, Setting]) -> dict[int, dict[str, list[Run]]]:
        """Every method, in its chosen setting, at every budget."""
        table: dict[int, dict[str, list[Run]]] = {}
        for budget in self.size.budgets:
            table[budget] = {
                label: [self.of_table_1(METHODS[label], setting, budget, seed) for seed in self.size.seeds]
                for label, setting in chosen.items()
            }
        return table

    def sft_against_fine_tuning(self) -> dict[tuple[float, str], list[Run]]:
        """SFT sharpening against standard fine-tuning, at equal updates and at equal compute."""
        runs, plain = {}, compute_per_update(SFT, {**self.of_images, **PLAIN}, self.decode)
        for rate in self.size.learning_rates:
            name, options = f"sft_{short(rate)}", {"learning_rate": rate, "updates": self.size.updates}
            sharpened = self.per_seed(f"{name}_n3_m3", SFT, **SHARPENED, **options)
            runs[rate, "SFT sharpening, n = m = 3"] = sharpened
            runs[rate, "fine-tuning, equal updates"] = self.per_seed(f"{name}_n1_m1", SFT, **PLAIN, **options)
            options["updates"] = round(sharpened[0].compute / plain)
            runs[rate, "fine-tuning, equal compute"] = self.per_seed(f"{name}_n1_m1_long", SFT, **PLAIN, **options)
        return runs

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


def make_plan(planner: Planner, chosen: Mapping[str, Setting]) -> Plan:
    """All runs of the study but those of its tuning; `chosen` is the setting of every method of table 1."""
    against = planner.sft_against_fine_tuning()
    return Plan(planner.table_1(chosen), against, planner.sweeps(), planner.selection(), planner.searches())
