"""`report.html`: the evaluation for the eye, in one page that opens from disk without a network.

The table with intervals, the gains by prompt, every image beside what the other models drew from the same noise, the
reward that was trained on against the others, and the cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from sharpening.evaluation.comparison import Z95, Comparison
from sharpening.evaluation.report import Results, Scores
from sharpening.pages import EMBED_LIMIT, data_uri, write_page

TEMPLATE = Path(__file__).parent / "templates" / "report.html.jinja"


def write_html(
    path: Path,
    settings: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    results: Results,
    scores: Scores,
    prompts: Sequence[str],
    images: Mapping[str, Sequence[Path]],
    labels: Mapping[str, str],
) -> None:
    """Write the page.

    Images of up to 16 MiB in all are embedded, and the page can be sent by itself. Larger ones stay files that the
    page names relative to its own folder: the folder has to go along.

    Args:
        settings: `summary.json`'s; `reward_model` is what was trained on, `seed` is that of the first image.
        models: what is said of each by name, the base first: `path`, `search`, `nfe`, `seconds`.
        prompts: of the N images.
        images: PNG files of each model, N each, below the folder of `path`.
        labels: what each metric is called for short.
    """
    distinct = list(dict.fromkeys(prompts))
    place = {prompt: index for index, prompt in enumerate(distinct)}
    write_page(
        path,
        TEMPLATE,
        settings=settings,
        num_images=len(prompts),
        num_prompts=len(distinct),
        models=[
            {"name": name, **facts, "nfe": _number(facts["nfe"], "g"), "seconds": _number(facts["seconds"], ".3g")}
            for name, facts in models.items()
        ],
        labels=labels,
        metrics=[
            {"name": metric, "label": labels[metric], "rows": _rows(of_models)}
            for metric, of_models in results.items()
        ],
        panels=_panels(results, settings["reward_model"], labels),
        data={
            "models": list(models),
            "metrics": [labels[metric] for metric in results],
            "trainedOn": list(results).index(settings["reward_model"]),
            "prompts": distinct,
            "promptOf": [place[prompt] for prompt in prompts],
            "scores": [[_rounded(scores[metric][model]) for model in models] for metric in results],
            "images": _addresses([images[model] for model in models], path.parent),
            "seed": settings["seed"],
        },
    )


def _number(value: float, form: str) -> str:
    return "unknown" if np.isnan(value) else f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def _rounded(values: np.ndarray) -> list[float | None]:
    """Five digits are more than a page shows; None where an image has no score."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]


def _addresses(images: Sequence[Sequence[Path]], folder: Path) -> list[list[str]]:
    """What the page calls each image."""
    if sum(file.stat().st_size for files in images for file in files) <= EMBED_LIMIT:
        return [[data_uri(file.read_bytes()) for file in files] for files in images]
    return [[quote(file.relative_to(folder).as_posix()) for file in files] for files in images]


def _gain_interval(c: Comparison) -> tuple[float, float]:
    return c.gain - Z95 * c.gain_standard_error, c.gain + Z95 * c.gain_standard_error


def _rows(of_models: Mapping[str, Comparison]) -> list[dict[str, Any]]:
    """Lines of the table: the numbers as text, and where the bar of a gain's interval begins and how wide it is, in %
    of a scale that all models share and that has 0 in its middle."""
    bounds = [abs(bound) for c in of_models.values() for bound in _gain_interval(c) if np.isfinite(bound)]
    scale = max([*bounds, 1e-12])
    rows = []
    for index, (name, c) in enumerate(of_models.items()):
        colour = index and 1 + (index - 1) % 5  # of the base, then five that come again
        mean = f"{_number(c.mean, '.4f')} ± {_number(c.standard_error, '.4f')}"
        row = {"model": name, "colour": colour, "images": c.images, "mean": mean, "gain": ""}
        if not np.isnan(c.gain):
            low, high = _gain_interval(c)
            row |= {"gain": _number(c.gain, "+.4f"), "direction": {1: "up", -1: "down"}.get(_direction(c), "")}
            row |= {"wins": f"{c.win_rate:.3f}", "wins_interval": f"[{c.win_low:.3f}, {c.win_high:.3f}]"}
            row |= {"gain_interval": f"[{_number(low, '+.4f')}, {_number(high, '+.4f')}]", "left": 50, "width": 0}
            if np.isfinite(low):
                row |= {"left": round(50 + 50 * low / scale, 2), "width": round(50 * (high - low) / scale, 2)}
        rows.append(row)
    return rows


def _direction(c: Comparison) -> int:
    """1 or -1 where the interval of the gain lies above or below 0, else 0."""
    low, high = _gain_interval(c)
    return int(low > 0) - int(high < 0)


def _panels(results: Results, trained_on: str, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """A scatter for each reward that was not trained on: its place among the metrics, and where every model's cloud
    moved."""
    panels = []
    for index, (metric, of_models) in enumerate(results.items()):
        if metric == trained_on:
            continue
        moves = []
        for model, across, upward in zip(of_models, results[trained_on].values(), of_models.values(), strict=True):
            if np.isnan(across.gain) or np.isnan(upward.gain):
                continue
            horizontal, vertical = _direction(across), _direction(upward)
            ways = [{1: "right", -1: "left"}.get(horizontal), {1: "up", -1: "down"}.get(vertical)]
            words = " and ".join(filter(None, ways)) or "no clear move"
            gamed = (horizontal, vertical) == (1, -1)
            words += ": this reward was lost, the one trained on may have been gamed" if gamed else ""
            gains = f"{labels[trained_on]} {_number(across.gain, '+.4f')}, "
            gains += f"{labels[metric]} {_number(upward.gain, '+.4f')}"
            moves.append({"model": model, "gains": gains, "words": words, "gamed": gamed})
        label = f"Scatter of {labels[trained_on]} against {labels[metric]}, one point an image."
        label += "".join(f" {move['model']}: {move['words']}." for move in moves)
        panels.append({"index": index, "label": label, "moves": moves})
    return panels
