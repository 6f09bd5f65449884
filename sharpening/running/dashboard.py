"""Runs compared by their `metrics.jsonl` alone: one HTML page that needs no network, or a picture.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sharpening import pages
from sharpening.errors import UserError, require
from sharpening.files import write_aside
from sharpening.running.metric_names import GROUPS, MEANING, PHASES, grouped, meaning

FILE = "metrics.jsonl"
TEMPLATE = Path(__file__).parent / "templates" / "dashboard.html.jinja"
MOST_POINTS = 1500  # of a curve; longer ones become means of neighbours
DIGITS = 6  # of a value
AXES = {"steps": "cost/steps", "forwards": "cost/forwards", "seconds": "cost/seconds"}
AXIS_TITLES = {
    "steps": "optimizer steps",
    "forwards": "forwards, 3 for a row that is trained on",
    "seconds": "seconds of training",
}
# Curves that are read together, the second one dashed.
TOGETHER = {
    "reward/best and worst": ("reward/best", "reward/worst"),
    "preference/log ratio": ("preference/log_ratio_best", "preference/log_ratio_worst"),
}
BANDS = {"reward/mean": "reward/spread", "validation/reward": "validation/reward_standard_error"}
REFERENCES = {"preference/accuracy": 0.5, "preference/steps_won": 0.5}
SHOWN_PHASES = (*PHASES[:-1], "other", PHASES[-1])
# What the page has as a table, as bars or as the band of another curve.
UNCHARTED = {*AXES.values(), *(f"time/{phase}" for phase in SHOWN_PHASES), "validation/reward_standard_error"} | {
    f"cost/{name}" for name in ("rows_without_gradient", "rows_trained", "images_judged", "peak_memory_gib")
}
PICTURED = (
    "reward/mean", "preference/accuracy", "preference/logits", "preference/log ratio", "preference/kl",
    "train/grad_norm",
)  # fmt: skip


class Curves(NamedTuple):
    """A run as it is drawn."""

    name: str
    steps: int  # optimizer steps that it has finished
    values: dict[str, list[float | None]]  # by the names of trackers, all of one length


def read_run(path: Path) -> Curves:
    """The curves of a run, a folder or its `metrics.jsonl`. A last line cut short, as a kill leaves it, is ignored.

    Raises:
        UserError: naming the file and the remedy.
    """
    file = path / FILE if path.is_dir() else path
    require(file.is_file(), f"{path} holds no {FILE}; give the --output_dir of a run")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); give the --output_dir of a run") from error
    lines = [_parse(line) for line in text.splitlines()]
    if lines and lines[-1] is None:
        lines.pop()
    if None in lines:
        raise UserError(f"{file} is damaged in line {lines.index(None) + 1}; mend or remove that line")
    require(bool(lines), f"{file} has no finished step; wait until the run has one")
    named = [grouped(line) for line in lines]
    names = dict.fromkeys(name for line in named for name in line)
    values = {name: [_finite(line.get(name)) for line in named] for name in names}
    return Curves((path if path.is_dir() else path.parent).resolve().name, int(lines[-1]["step"]), values)


def _parse(line: str) -> dict[str, float] | None:
    """The metrics of a line; None if it is not one that a run writes."""
    try:
        metrics = json.loads(line)
    except ValueError:
        return None
    if not isinstance(metrics, dict) or "step" not in metrics:
        return None
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in metrics.values())
    return metrics if numbers and math.isfinite(metrics["step"]) else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def read_runs(paths: Iterable[Path]) -> list[Curves]:
    """The curves of several runs, named by the end of their paths that tells them apart.

    Raises:
        UserError: as of `read_run`, or one run is named twice.
    """
    paths = [*paths]
    runs = [read_run(path) for path in paths]
    folders = [(path if path.is_dir() else path.parent).resolve() for path in paths]
    for folder in folders:
        require(folders.count(folder) == 1, f"{folder} is named twice; name each run once")
    return [run._replace(name=_name(folder, folders)) for run, folder in zip(runs, folders, strict=True)]


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """As much of the end of a folder's path as no other of the folders has."""
    length = 1
    while sum(other.parts[-length:] == folder.parts[-length:] for other in folders) > 1:
        length += 1
    return "/".join(folder.parts[-length:])


def thinned(values: Sequence[float | None], every: int, last: bool) -> list[float | None]:
    """A value for `every` so many: their last, or the mean of those that there are."""
    parts = [values[start : start + every] for start in range(0, len(values), every)]
    made = [part[-1] if last else mean(part) for part in parts]
    return [None if value is None else float(f"{value:.{DIGITS}g}") for value in made]


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values that there are."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def page_data(runs: Sequence[Curves], against: str) -> dict[str, Any]:
    """All that the page draws, as JSON has it; `against` is the axis that it begins with."""
    names = list(dict.fromkeys(name for run in runs for name in run.values))
    charts, idle = charts_of(names, runs)
    return {
        "against": against,
        "axes": [{"name": name, "title": AXIS_TITLES[name]} for name in AXES],
        "runs": [_as_json(run) for run in runs],
        "groups": charts,
        "phases": [{"name": phase, "meaning": MEANING[f"time/{phase}"]} for phase in SHOWN_PHASES],
        "idle": idle,
    }


def _as_json(run: Curves) -> dict[str, Any]:
    every = math.ceil(len(run.values["cost/steps"]) / MOST_POINTS)
    rewards = [value for value in run.values.get("reward/mean", []) if value is not None]
    tenth = max(1, len(rewards) // 10)
    validated = [value for value in run.values.get("validation/reward", []) if value is not None]
    last = {name: values[-1] for name, values in run.values.items()}
    return {
        "name": run.name,
        "facts": {
            "steps": run.steps,
            **{name: last.get(f"cost/{name}") for name in ("forwards", "images_judged", "seconds")},
            "memory": last.get("cost/peak_memory_gib"),
            "first": mean(rewards[:tenth]),
            "last": mean(rewards[-tenth:]),
            "validation": validated[-1] if validated else None,
        },
        "phases": [mean(run.values.get(f"time/{phase}", [])) for phase in SHOWN_PHASES],
        # Where one line has no cost, because an earlier version wrote it, the run cannot be drawn over cost.
        "axes": {
            axis: None if None in run.values.get(name, [None]) else thinned(run.values[name], every, last=True)
            for axis, name in AXES.items()
        },
        "curves": {name: thinned(of, every, last=False) for name, of in run.values.items()},
    }


def charts_of(names: Sequence[str], runs: Sequence[Curves]) -> tuple[list[dict[str, Any]], list[str]]:
    """The charts of each group, in the order of `GROUPS` and `MEANING`, and the curves that are 0 all the time."""
    idle = [name for name in names if not any(value for run in runs for value in run.values.get(name, []))]
    place = {name: index for index, name in enumerate(MEANING)}
    titles = {name: title for title, pair in TOGETHER.items() for name in pair}
    charts: dict[str, dict[str, Any]] = {}
    for name in sorted(set(names) - set(idle) - UNCHARTED, key=lambda name: (place.get(name, len(place)), name)):
        about = {"meaning": meaning(name), "band": BANDS.get(name), "reference": REFERENCES.get(name)}
        title = titles.get(name, name)
        charts.setdefault(title, {"title": title, "lines": [], **about})["lines"].append(name)
    groups = [
        {"name": group, "charts": [chart for chart in charts.values() if chart["lines"][0].startswith(f"{group}/")]}
        for group in GROUPS
    ]
    return groups, sorted(set(idle) - UNCHARTED)


def write_page(runs: Sequence[Curves], path: Path, against: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        pages.write_page(path, TEMPLATE, data=page_data(runs, against))
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error}); name another file") from error


def write_picture(runs: Sequence[Curves], path: Path, against: str, curves: Sequence[str] = ()) -> None:
    """Draw some curves of the runs, each in a panel, as a PNG; those of `TOGETHER` by their common name. None named:
    those of `PICTURED` that a run has.

    Raises:
        UserError: a curve or an axis that no run has, or a file that cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axis, known = AXES[against], sorted({name for run in runs for name in run.values})
    lines_of = {curve: TOGETHER.get(curve, (curve,)) for curve in curves or PICTURED}
    if not curves:
        lines_of = {curve: lines for curve, lines in lines_of.items() if any(line in known for line in lines)}
    require(bool(lines_of), "--picture: no run has a curve that is drawn unless told; name some by --curves")
    for curve, lines in lines_of.items():
        require(any(line in known for line in lines), f"--curves {curve}: no run has it; there are {', '.join(known)}")
    missing = [run.name for run in runs if None in run.values.get(axis, [None])]
    require(not missing, f"--against {against}: {', '.join(missing)} has no {axis}; choose --against steps")
    columns = min(3, len(lines_of))
    rows = math.ceil(len(lines_of) / columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(3.3 * columns, 2.1 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(lines_of) :]:
        panel.axis("off")
    for panel, (curve, lines) in zip(panels.flat, lines_of.items(), strict=False):
        for number, run in enumerate(runs):
            for line, style in zip(lines, ("-", "--"), strict=False):
                points = [
                    (x, y) for x, y in zip(run.values[axis], run.values.get(line, []), strict=False) if y is not None
                ]
                if points:
                    label = run.name if line == lines[0] else None
                    panel.plot(*zip(*points, strict=True), style, color=f"C{number}", linewidth=1.1, label=label)
        panel.set_title(curve + (" (worst dashed)" if len(lines) > 1 else ""), fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    figure.supxlabel(AXIS_TITLES[against], fontsize=8)
    # A run may have two lines in a panel, and none in another.
    lines = {line.get_label(): line for panel in panels.flat for line in reversed(panel.get_lines())}
    names = [run.name for run in runs if run.name in lines]
    figure.legend(
        [lines[name] for name in names], names, loc="outside upper center", ncols=4, frameon=False, fontsize=8
    )
    try:
        with write_aside(path) as aside:
            figure.savefig(aside, dpi=90, format="png")
    except OSError as error:
        raise UserError(f"--picture {path} cannot be written ({error}); name another file") from error
    finally:
        pyplot.close(figure)
