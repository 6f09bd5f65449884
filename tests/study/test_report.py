"""The numbers of the tables."""

import numpy as np
import pytest

from study.report import gain, signed


def test_the_error_of_a_gain_counts_seeds_and_images():
    comparisons = [{"gain": value, "gain_standard_error": 0.3} for value in (1.0, 2.0, 6.0)]
    mean, error = gain(comparisons)
    assert (mean, error) == (3.0, pytest.approx((np.var([1, 2, 6], ddof=1) / 3 + 0.09) ** 0.5))
    assert signed(comparisons[:1]) == "+1.000 ± 0.300*"
