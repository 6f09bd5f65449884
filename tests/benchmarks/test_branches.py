"""The cost of another branch and another step."""

import pytest

from benchmarks import branches
from sharpening.errors import UserError


@pytest.mark.slow
def test_cost_is_a_line_through_all_pairs(benchmark_run):
    printed = benchmark_run("branches", "--model", "tiny", "--rounds", 2, "--n", 1, 4, "--m", 1, 2)
    assert [line.split()[:2] for line in printed.splitlines() if line.endswith("GiB")] == [
        ["1", "1"], ["1", "2"], ["4", "1"], ["4", "2"],
    ]  # fmt: skip
    assert "a branch and step more costs" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds is 0, but it must be at least 1"),
        (["--n", "0", "2"], "--n has 0, but it must be at least 1"),
        (["--n", "1", "2", "--m", "3"], "--n above 1 and --m give no two amounts of work"),
    ],
)
def test_mistake_is_told_in_one_sentence(flags, message):
    with pytest.raises(UserError, match=message):
        branches.main(flags)
