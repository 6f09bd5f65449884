"""What passes before the first step."""

import pytest

from benchmarks import startup
from sharpening.errors import UserError


@pytest.mark.slow
def test_start_is_timed(benchmark_run):
    printed = benchmark_run("startup", "--images", 12, "--rounds", 1)
    assert "12 images prepared in" in printed and "found prepared by a second start" in printed
    assert printed.count("--help: ") == printed.count("--dry_run: ") == 2


def test_mistake_is_told_in_one_sentence():
    with pytest.raises(UserError, match="--rounds is 0, but it must be at least 1"):
        startup.main(["--rounds", "0"])
