"""What an evaluation leaves to read: a table, `summary.json`, `summary.csv`, `scores.csv` and `grid.png`."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sharpening.evaluation.comparison import Comparison
from sharpening.files import write_aside

if TYPE_CHECKING:
    from torch import Tensor

Results = Mapping[str, Mapping[str, Comparison]]  # metric -> model -> its comparison with the base
Scores = Mapping[str, Mapping[str, np.ndarray]]  # metric -> model -> (N,), NaN where an image has no score


def table(results: Results, trained_on: str) -> str:
    """The comparisons as text, grouped by metric."""
    header = ["metric", "model", "mean", "(se)", "gain", "(se)", "wins over base [95%]"]
    lines = [header]
    for metric, models in results.items():
        label = f"{metric} (trained on)" if metric == trained_on else metric
        for model, c in models.items():
            cells = [label, model, f"{c.mean:.4f}", f"{c.standard_error:.4f}"]
            if not np.isnan(c.gain):
                cells += [f"{c.gain:+.4f}", f"{c.gain_standard_error:.4f}"]
                cells += [f"{c.win_rate:.3f} [{c.win_low:.3f}, {c.win_high:.3f}]"]
            lines.append([*cells, *[""] * (len(header) - len(cells))])
            label = ""
    text = aligned(lines, left=2)
    rule = "-" * max(map(len, text))
    body = []
    for line in text[1:]:
        if line[0] != " ":
            body.append(rule)
        body.append(line)
    return "\n".join([text[0], *body])


def aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of cells as text in columns; the first `left` columns begin, the others end, under each other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def write_files(
    output_dir: Path,
    settings: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    results: Results,
    scores: Scores,
    prompts: Sequence[str],
) -> None:
    """`summary.json`, `summary.csv` and `scores.csv`.

    Args:
        settings: of all models; `seed` is that of the first image.
        models: what is said of each by name: `nfe` and `seconds` of an image, and more for `summary.json`.
        prompts: of the N images.
    """
    import pandas

    metrics = {metric: {name: c._asdict() for name, c in of_models.items()} for metric, of_models in results.items()}
    summary = {"settings": settings, "models": models, "metrics": metrics}
    with write_aside(output_dir / "summary.json") as aside:
        aside.write_text(json.dumps(_without_nan(summary), indent=2))
    comparisons = pandas.DataFrame(
        {"metric": metric, "model": name, **c, "nfe": models[name]["nfe"], "seconds": models[name]["seconds"]}
        for metric, of_models in metrics.items()
        for name, c in of_models.items()
    )
    columns = {f"{name}/{metric}": values for metric, of in scores.items() for name, values in of.items()}
    seeds = range(settings["seed"], settings["seed"] + len(prompts))
    images = pandas.DataFrame({"prompt": prompts, "seed": seeds, **columns})
    for file, frame in (("summary.csv", comparisons), ("scores.csv", images)):
        with write_aside(output_dir / file) as aside:
            frame.to_csv(aside, index=False, lineterminator="\r\n")  # as RFC 4180 has it


def _without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


def write_grid(images: Mapping[str, Tensor], prompts: Sequence[str], path: Path) -> None:
    """A grid of strips, one for each prompt: the same noise drawn by every model, in their order."""
    import matplotlib

    matplotlib.use("Agg")
    import torch
    from matplotlib import pyplot
    from torchvision.utils import make_grid

    columns = max(1, 12 // len(images))
    rows = -(-len(prompts) // columns)
    width = columns * 1.3 * len(images)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, rows * 1.75 + 0.4), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, (axis, prompt) in enumerate(zip(axes.flat, prompts, strict=False)):
        strip = torch.stack([drawn[index] for drawn in images.values()])
        gap = max(1, strip.shape[2] // 16)
        strip = make_grid(strip, nrow=len(strip), padding=gap, pad_value=1)  # white, around the images too
        axis.imshow(strip.permute(1, 2, 0).numpy(), interpolation="nearest")
        title = textwrap.fill(prompt, 22 * len(images), max_lines=2, placeholder=" ...")  # as wide as its strip
        axis.set_title(title, fontsize=7, parse_math=False)
    figure.suptitle(f"same noise, from left to right: {', '.join(images)}", fontsize=10)
    figure.tight_layout()
    with write_aside(path) as aside:
        figure.savefig(aside, dpi=150, format="png")
    pyplot.close(figure)
