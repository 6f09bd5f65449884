"""The statistics behind the table of an evaluation."""

import math

import numpy as np
import pytest

from sharpening.evaluation.comparison import compare


def test_closed_form():
    scores, base = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 4.0, 1.0])
    result = compare(scores, base)
    assert (result.images, result.mean, result.gain, result.win_rate) == (4, 2.5, 0.75, 0.625)
    assert result.standard_error == pytest.approx(scores.std(ddof=1) / 2)
    assert result.gain_standard_error == pytest.approx((scores - base).std(ddof=1) / 2)
    assert 0 <= result.win_low <= result.win_rate <= result.win_high <= 1
    assert compare(scores, base) == result


def test_images_without_a_score_in_either_are_left_out():
    scores, base = np.array([1.0, np.nan, 3.0, 5.0]), np.array([0.0, 2.0, np.nan, 6.0])
    result = compare(scores, base)
    assert (result.images, result.mean, result.gain, result.win_rate) == (2, 3.0, 0.0, 0.5)
    nothing = compare(np.array([np.nan]), np.array([1.0]))
    assert nothing.images == 0 and math.isnan(nothing.mean) and math.isnan(nothing.win_low)


@pytest.mark.slow
@pytest.mark.parametrize(("probability", "ties"), [(0.5, 0.0), (0.7, 0.0), (0.6, 0.3)])
def test_interval_covers_the_true_win_rate_at_its_nominal_rate(probability, ties):
    """300 synthetic evaluations of 150 images each; the standard error of the coverage is 0.013."""
    rng = np.random.default_rng(0)
    truth = probability * (1 - ties) + 0.5 * ties
    covered = 0
    for trial in range(300):
        tied = rng.random(150) < ties
        difference = np.where(tied, 0.0, np.where(rng.random(150) < probability, 1.0, -1.0))
        result = compare(difference, np.zeros(150), resamples=500, seed=trial)
        covered += result.win_low <= truth <= result.win_high
    assert 0.91 <= covered / 300 <= 0.985
