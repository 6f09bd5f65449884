"""Tables and figures of the study (`study/execution.py`), from what `scripts/evaluate.py` and the runs left behind."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sharpening.files import write_aside
from sharpening.pages import write_page
from study.methods import EFFICIENT_RLHF, ON_IMAGES, THE_LETTER, Setting
from study.plan import Plan, Run, Tuning, groups_of
from study.settings import DATA, METRICS, Size
from tiny_world.shapes import held_out_captions, judged_captions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WANTED = 0.9  # the reward of which it is asked what reaching it costs
Tables = dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]]  # title -> (header, rows)
LEGEND = (
    "`a ± b`: mean and standard error of the gain over the base on the same prompts and noise, b from the spread over "
    "{seeds} training seed(s) and the spread over the {images} images: sqrt(variance over seeds / seeds + squared "
    "standard error over images); where one seed was run, from the images alone (marked *)."
)


def gain(comparisons: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Mean gain over seeds and its standard error, from `evaluation.Comparison`s of one setting.

    All seeds are judged on the same images, so the noise of those does not average out: it is added whole.
    """
    gains = [comparison["gain"] for comparison in comparisons]
    of_images = np.mean([comparison["gain_standard_error"] ** 2 for comparison in comparisons])
    of_seeds = np.var(gains, ddof=1) / len(gains) if len(gains) > 1 else 0.0
    return float(np.mean(gains)), float((of_seeds + of_images) ** 0.5)


def signed(comparisons: Sequence[Mapping[str, float]]) -> str:
    mean, error = gain(comparisons)
    return f"{mean:+.3f} ± {error:.3f}" + ("*" if len(comparisons) == 1 else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def curve(model: Path, name: str) -> np.ndarray:
    """A curve of the `metrics.jsonl` in a run's folder; steps without a value are left out."""
    from sharpening.running.tracking import read_metrics

    return np.array([line[name] for line in read_metrics(model / "metrics.jsonl") if name in line])


def counted(model: Path, decode: float) -> np.ndarray:
    """Forwards of a row that a run had needed after each of its updates, as it counted them by hooks; what it drew to
    be validated is not among them. decode: what decoding a latent costs, in such forwards."""
    return curve(model, "cost/forwards") + decode * curve(model, "cost/images_judged")


def diversity(folder: Path) -> float:
    """Standard deviation of a pixel over the images of one prompt, a mean over pixels and prompts, in [0, 1]."""
    from PIL import Image

    files = sorted(folder.glob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file), dtype=np.float32) / 255 for file in files])
    of_prompt = np.array([file.stem.rpartition("-")[2] for file in files])
    return float(np.mean([pixels[of_prompt == prompt].std(0).mean() for prompt in np.unique(of_prompt)]))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running means; shorter by window - 1."""
    return np.convolve(values, np.ones(window) / window, mode="valid")


@dataclass(frozen=True)
class Report:
    """Reads the results of a finished study in `output_dir`."""

    tuning: Tuning
    plan: Plan
    size: Size
    output_dir: Path
    decode: float  # what decoding a latent costs, in forwards of a row

    @cached_property
    def _group_of(self) -> dict[str, str]:
        return groups_of({**self.plan.first_groups(), **self.plan.other_groups()})

    @cached_property
    def _summaries(self) -> dict[str, dict]:
        files = (self.output_dir / "evaluation").glob("*/summary.json")
        return {file.parent.name: json.loads(file.read_text()) for file in files}

    def summary(self, group: str) -> dict:
        """`summary.json` of an evaluation."""
        return self._summaries[group]

    def judged(self, group: str, name: str, metric: str = "shapes") -> dict:
        """The comparison of a model with the base; see `evaluation.Comparison`."""
        return self.summary(group)["metrics"][METRICS.get(metric, metric)][name]

    def of(self, runs: Sequence[Run], metric: str = "shapes") -> list[dict]:
        """The comparisons of some runs with the base."""
        return [self.judged(self._group_of[run.key], run.key, metric) for run in runs]

    def diversity(self, group: str, name: str) -> float:
        """`diversity` of a model's images."""
        return diversity(Path(self.summary(group)["models"][name]["images"]))

    def curve(self, run: Run, name: str) -> np.ndarray:
        """`curve` of a run."""
        return curve(self.output_dir / "runs" / run.key / "model", name)

    def counted(self, run: Run) -> np.ndarray:
        """`counted` of a run."""
        return counted(self.output_dir / "runs" / run.key / "model", self.decode)

    def write(self, only_first: bool) -> str:
        """Redraw every table and figure from what runs and evaluations left: `tables.md`, whose text is returned, each
        table as `tables/NAME.csv`, the figures, and all of it on one page, `gallery.html`. only_first: only those of
        table 1 and of the tuning for it."""
        tables = self._table_1() | self._tuning()
        if not only_first:
            tables |= self._sft_against_fine_tuning() | self._sweeps() | self._selection() | self._searches()
        legend = LEGEND.format(seeds=len(self.size.seeds), images=self.size.images)
        parts, shown = [legend], []
        for title, (header, rows) in tables.items():
            parts += [f"## {title}", markdown(header, rows)]
            name = "_".join(re.findall(r"[a-z0-9]+", title.partition(" (")[0].lower()))
            shown.append({"title": title, "file": f"{name}.csv", "header": header, "rows": rows})
            with (
                write_aside(self.output_dir / "tables" / f"{name}.csv") as aside,
                aside.open("w", encoding="utf-8", newline="") as file,
            ):
                csv.writer(file).writerows([header, *rows])
        text = "\n\n".join(parts) + "\n"
        with write_aside(self.output_dir / "tables.md") as aside:
            aside.write_text(text)
        figures = self._draw_figures(only_first)
        template = Path(__file__).parent / "gallery.html.jinja"
        write_page(self.output_dir / "gallery.html", template, legend=legend, figures=figures, tables=shown)
        return text

    def _table_1(self) -> Tables:
        tables = {}
        for budget, methods in self.plan.table_1.items():
            first = f"table1_{budget // 1000}k_s{self.size.seeds[0]}"
            base = [self.judged(first, "base", metric)["mean"] for metric in ("shapes", *METRICS)]
            header = ["method", "setting", "updates", "compute", "reward", "win rate", *METRICS, "diversity"]
            cells = [f"{base[0]:.3f}", "", *(f"{value:.3f}" for value in base[1:])]
            rows = [["base", "", "", "", *cells, f"{self.diversity(first, 'base'):.3f}"]]
            for label, runs in methods.items():
                wins = np.mean([comparison["win_rate"] for comparison in self.of(runs)])
                diversity = np.mean([self.diversity(self._group_of[run.key], run.key) for run in runs])
                compute = np.mean([self.counted(run)[-1] for run in runs])
                spent = [self._setting(label).words, f"{runs[0].updates}", f"{compute / 1000:.1f}k"]
                others = [signed(self.of(runs, metric)) for metric in METRICS]
                rows.append([label, *spent, signed(self.of(runs)), f"{wins:.2f}", *others, f"{diversity:.3f}"])
            tables[f"Table 1: a compute of {budget // 1000}k"] = header, rows
        header, rows = ["method", "compute"], []
        for label, runs in self.plan.largest.items():
            reached = self._reaches(*self._over_compute(runs[0]))
            rows.append([label, f"{reached:.0f}k" if reached else "not reached"])
        return tables | {f"Compute to a held-out reward of {WANTED:.2f}": (header, rows)}

    def _setting(self, label: str) -> Setting:
        """What was chosen for a method: what its smallest run of table 1 was tuned with."""
        least = self.plan.table_1[min(self.plan.table_1)][label][0]
        return next(setting for setting, run in self.tuning.tried[label].items() if run.key == least.key)

    def _tuning(self) -> Tables:
        rows, group_of = [], groups_of(self.tuning.groups())
        for label, tried in self.tuning.tried.items():
            chosen = self._setting(label)
            for setting, run in tried.items():
                row = [label, setting.words, f"{run.updates}", signed([self.judged(group_of[run.key], run.key)])]
                rows.append([*row, "chosen" if setting == chosen else ""])
        title = f"What was tried at a compute of {min(self.size.budgets) // 1000}k ({self.size.tuning_images} images)"
        return {title: (["method", "setting", "updates", "reward on the tuning prompts", ""], rows)}

    def _sft_against_fine_tuning(self) -> Tables:
        rates, rows = list(self.size.learning_rates), []
        for label in dict.fromkeys(label for _, label in self.plan.sft_against_fine_tuning):
            runs = [self.plan.sft_against_fine_tuning[rate, label] for rate in rates]
            spent = [f"{runs[0][0].updates}", f"{runs[0][0].compute / 1000:.0f}k"]
            rows.append([label, *spent, *(signed(self.of(of_rate)) for of_rate in runs)])
        header = ["", "updates", "compute", *(f"lr {rate:g}" for rate in rates)]
        return {"SFT sharpening against standard fine-tuning": (header, rows)}

    def _sweeps(self) -> Tables:
        tables = {}
        for sweep in self.plan.sweeps:
            rows = [["gain", *(signed(self.of(runs)) for runs in sweep.runs.values())]]
            rows.append(["compute", *(f"{runs[0].compute / 1000:.0f}k" for runs in sweep.runs.values())])
            tables[sweep.title] = [sweep.flag, *map(str, sweep.runs)], rows
        return tables

    def _selection(self) -> Tables:
        header = [
            "trained on",
            *(f"gain, {words}" for words in DATA.values()),
            "mean loss, first third of the updates",
        ]
        rows = []
        for label in dict.fromkeys(label for label, _ in self.plan.selection):
            both = [self.plan.selection[label, data] for data in DATA]
            early = [self.curve(run, "loss")[: max(1, self.size.updates // 3)].mean() for run in both[0]]
            rows.append([label, *(signed(self.of(runs)) for runs in both), f"{np.mean(early):.4f}"])
        return {"What selection over noises does": (header, rows)}

    def _searches(self) -> Tables:
        header, rows = ["", "NFE", "reward", "gain", "gain in likeness"], []
        named = [(group, name, name) for group, name in (("search_best_of_n", "rlhf"), ("search_best_of_n", "sft"))]
        for group, name, spec, on_rlhf in self.plan.search_specs():
            named.append((group, name, f"{spec} on RLHF sharpening" if on_rlhf else spec))
        for group, name, label in named:
            nfe, reward = self.summary(group)["models"][name]["nfe"], self.judged(group, name)
            likeness = self.judged(group, name, "likeness")
            label = {"rlhf": EFFICIENT_RLHF, "sft": ON_IMAGES}.get(label, label)
            rows.append([label, f"{nfe:.0f}", f"{reward['mean']:.3f}", signed([reward]), signed([likeness])])
        return {f"Figure 5: search at inference ({self.size.search_images} images)": (header, rows)}

    def _draw_figures(self, only_first: bool) -> dict[str, str]:
        """`reward_by_compute.png` of table 1, `figure4.png` to `figure6.png`, and `branches_and_steps.png` for tables
        2 and 3; returns what each shows, by its name."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figures = {
            "reward_by_compute.png": ("Table 1: held-out reward against compute", self._compute_figure),
            "figure6.png": ("Figure 6: the reward while training", self._figure_6),
        }
        if not only_first:
            figures |= {
                "figure4.png": ("Figure 4: SFT sharpening and standard fine-tuning", self._figure_4),
                "figure5.png": ("Figure 5: search at inference", self._figure_5),
                "branches_and_steps.png": ("Tables 2 and 3: branches and steps", self._sweep_figure),
            }
        for name, (_, draw) in figures.items():
            figure = draw()
            figure.tight_layout()
            with write_aside(self.output_dir / name) as aside:
                figure.savefig(aside, dpi=110, format="png")
            pyplot.close(figure)
        return {name: title for name, (title, _) in figures.items()}

    def _validated(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Updates at which held-out images were drawn, and their mean reward."""
        reward = self.curve(run, "validation/reward")
        return np.arange(1, len(reward) + 1) * run.flags["validation_steps"], reward

    def _over_compute(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Thousand forwards of a row at which a run drew held-out images, and their mean reward."""
        at, reward = self._validated(run)
        return self.counted(run)[at - 1] / 1000, reward

    @staticmethod
    def _reaches(forwards: np.ndarray, reward: np.ndarray) -> float | None:
        """Where the reward first comes to `WANTED`, on straight lines between the points; None: nowhere."""
        reached = np.flatnonzero(reward >= WANTED)
        if not len(reached):
            return None
        last = reached[0]
        if last == 0:
            return float(forwards[0])
        share = (WANTED - reward[last - 1]) / (reward[last] - reward[last - 1])
        return float(forwards[last - 1] + share * (forwards[last] - forwards[last - 1]))

    def _compute_figure(self) -> Figure:
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(9, 5.2))
        images = self.size.shown_images * len(judged_captions())
        base = self.judged(f"table1_{max(self.size.budgets) // 1000}k_s{self.size.seeds[0]}", "base")["mean"]
        for index, (label, runs) in enumerate(self.plan.largest.items()):
            bold = label == EFFICIENT_RLHF
            look = {"color": "k" if bold else f"C{index}", "linewidth": 2.4 if bold else 1.3}
            axis.plot(*self._over_compute(runs[0]), "o-", markersize=3, label=label, **look)
        axis.axhline(base, color="0.6", linewidth=0.8, linestyle="--")
        axis.axhline(WANTED, color="0.8", linewidth=0.8)
        axis.set(
            xlabel="compute, thousand forwards of a row", ylabel=f"held-out reward ({images} images)",
            title=f"Table 1 over time, first seed; dashed: the base on {self.size.images} images",
        )  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    def _figure_4(self) -> Figure:
        from matplotlib import pyplot

        rate = self.size.learning_rates[len(self.size.learning_rates) // 2]
        figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2))
        window = max(1, self.size.updates // 10)
        for index, label in enumerate(dict.fromkeys(label for _, label in self.plan.sft_against_fine_tuning)):
            run, colour = self.plan.sft_against_fine_tuning[rate, label][0], f"C{index}"
            loss = smooth(self.curve(run, "loss"), window)
            axes[0].plot(np.arange(window, window + len(loss)), loss, colour, label=label)
            at, reward = self._validated(run)
            axes[1].plot(at, reward, f"{colour}o-", markersize=3)
            axes[2].plot(at * run.compute / run.updates / 1000, reward, f"{colour}o-", markersize=3)
        held_out = f"held-out reward ({self.size.validation_images * len(held_out_captions())} images)"
        axes[0].set(
            xlabel="update", ylabel=f"training loss (running mean of {window})", xlim=(0, 2 * self.size.updates)
        )
        axes[1].set(xlabel="update", ylabel=held_out, xlim=(0, 2 * self.size.updates))
        axes[2].set(xlabel="compute, thousand forwards of a row", ylabel=held_out)
        axes[0].legend(frameon=False, fontsize=8)
        figure.suptitle(f"Figure 4 in miniature: SFT sharpening and standard fine-tuning, lr {rate:g}, seed 0")
        return figure

    def _figure_5(self) -> Figure:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(14, 4.8))
        lines = {f"{label} on the base": [] for label in self.plan.searches}
        lines["RLHF sharpening, then best of n"] = [("search_best_of_n", "rlhf")]
        lines["base"], lines["SFT sharpening"] = [("search_best_of_n", "base")], [("search_best_of_n", "sft")]
        for group, name, spec, on_rlhf in self.plan.search_specs():
            label = next(label for label, specs in self.plan.searches.items() if spec in specs)
            lines["RLHF sharpening, then best of n" if on_rlhf else f"{label} on the base"].append((group, name))
        marks = {"base": "ks", "SFT sharpening": "m^", "RLHF sharpening, then best of n": "r*-"}
        for axis, metric in zip(axes, ("shapes", "likeness"), strict=True):
            for label, points in lines.items():
                nfe = [self.summary(group)["models"][name]["nfe"] for group, name in points]
                values = [self.judged(group, name, metric) for group, name in points]
                mean, error = ([value[key] for value in values] for key in ("mean", "standard_error"))
                axis.errorbar(nfe, mean, error, fmt=marks.get(label, "o-"), markersize=5, label=label)
            ticks = [25 * 2**power for power in range(6)]
            axis.set_xscale("log")
            axis.set_xticks(ticks, map(str, ticks))
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
        axes[0].set(xlabel="NFE per image", ylabel="reward (what is searched for and trained on)")
        axes[1].set(xlabel="NFE per image", ylabel="likeness to real drawings (not optimised)")
        axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.suptitle("Figure 5 in miniature: held-out prompts, against the cost of an image")
        return figure

    def _figure_6(self) -> Figure:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), sharey=True)
        for axis, label in zip(axes, (ON_IMAGES, THE_LETTER, EFFICIENT_RLHF), strict=True):
            run = self.plan.largest[label][0]
            window = max(1, run.updates // 12)
            mean, spread = (smooth(self.curve(run, f"reward/{name}"), window) for name in ("mean", "spread"))
            steps = np.arange(window, window + len(mean))
            axis.plot(steps, mean, label="mean over branches")
            axis.fill_between(steps, mean - spread, mean + spread, alpha=0.2, linewidth=0, label="standard deviation")
            axis.plot(*self._validated(run), "ko-", markersize=3, label="held-out images")
            axis.set(xlabel="update", title=label)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("reward")
        axes[0].legend(frameon=False, fontsize=8)
        figure.suptitle("Figure 6 in miniature: reward while training, seed 0")
        return figure

    def _sweep_figure(self) -> Figure:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
        for sweep in self.plan.sweeps:
            axis = axes[0 if sweep.flag == "n" else 1]
            mean, error = zip(*(gain(self.of(runs)) for runs in sweep.runs.values()), strict=True)
            seeds = len(next(iter(sweep.runs.values())))
            label = f"{sweep.title}, {seeds} seed{'s' if seeds > 1 else ''}"
            axis.errorbar(list(sweep.runs), mean, error, fmt="o-", markersize=4, label=label)
            axis.set(xlabel=sweep.flag, xticks=self.size.sweep)
        for axis in axes:
            axis.axhline(0, color="0.7", linewidth=0.8)
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=8)
        axes[0].set_ylabel("gain over the base")
        figure.suptitle("Tables 2 and 3 in miniature: equal updates")
        return figure
