"""A score pass that walks on while a grader works, against one that waits."""

import pytest

from benchmarks import grading
from sharpening.errors import UserError


@pytest.mark.slow
def test_grader_that_works_meanwhile_is_set_against_one_that_is_waited_for(benchmark_run):
    printed = benchmark_run("grading", "--rounds", 2, "--seconds", 0.2)
    assert "0.2 s a grade" in printed and "of the time of waiting at every step" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds is 0, but it must be at least 1"),
        (["--seconds", "-1"], "--seconds is -1.0, but it must not be negative"),
    ],
)
def test_mistake_is_told_in_one_sentence(flags, message):
    with pytest.raises(UserError, match=message):
        grading.main(flags)
