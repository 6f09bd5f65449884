"""Statistics of scores, paired by prompt and seed."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Z95 = 1.96  # standard errors to each side of a 95% interval


class Comparison(NamedTuple):
    """One metric of one model; the last five are against the base on the same prompts and seeds, NaN for the base."""

    images: int  # that have a score, of both models
    mean: float
    standard_error: float
    gain: float
    gain_standard_error: float
    win_rate: float  # share of images better than the base's, ties counting a half
    win_low: float  # bounds of its 95% bootstrap interval
    win_high: float


def compare(scores: np.ndarray, base: np.ndarray | None, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Statistics of a model's scores (N,), paired with the base's (N,); images without a score in either are left out.

    The interval is the percentile bootstrap's over pairs (Efron & Tibshirani 1993, chapter 13): it speaks of other
    noise on these prompts, as the standard errors do; where a prompt has many images, other prompts may vary more.
    """
    known = np.isfinite(scores) if base is None else np.isfinite(scores) & np.isfinite(base)
    scores = scores[known]
    count = len(scores)

    def standard_error(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / count**0.5) if count > 1 else float("nan")

    mean = float(scores.mean()) if count else float("nan")
    if base is None or not count:
        return Comparison(count, mean, standard_error(scores), *[float("nan")] * 5)
    difference = scores - base[known]
    wins = (difference > 0) + 0.5 * (difference == 0)
    rng = np.random.default_rng(seed)
    rates = np.array([wins[rng.integers(count, size=count)].mean() for _ in range(resamples)])
    low, high = np.quantile(rates, [0.025, 0.975])
    return Comparison(
        count, mean, standard_error(scores), float(difference.mean()), standard_error(difference),
        float(wins.mean()), float(low), float(high),
    )  # fmt: skip


def compare_with_first(scores: Mapping[str, np.ndarray]) -> dict[str, Comparison]:
    """Each model's scores (N,) against those of the first, which is the base."""
    base = next(iter(scores.values()))
    return {name: compare(values, None if values is base else base) for name, values in scores.items()}
