"""What compiling the transformer blocks is measured by: operators and generated kernels."""

import json
import shutil

import pytest
import torch
from torch._inductor import config

from benchmarks import compiling
from sharpening.errors import UserError

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")


def layer(x, weight):
    """Three operators, the first two of which inductor makes one kernel of."""
    return (x.sin() + 1) @ weight


@pytest.mark.slow
@needs_compiler
def test_generated_kernels_are_launches_beside_the_operators_that_are_left():
    x, weight = torch.randn(2, 8, 8)
    compiled = torch.compile(layer)
    with config.patch("cpp.enable_kernel_profile", True):
        torch.testing.assert_close(compiled(x, weight), layer(x, weight))
        assert compiling.launches(lambda: layer(x, weight)) == (3, 0)
        assert compiling.launches(lambda: compiled(x, weight)) == (1, 1)
        assert compiling.launches(lambda: compiled(compiled(x, weight), weight)) == (2, 2)


@pytest.mark.slow
@needs_compiler
def test_command_compares_both(benchmark_run, tmp_path):
    output = tmp_path / "compiling.json"
    flags = ["--model", "tiny", "--resolution", 64, "--passes", "forward", "--rounds", 2, "--output", output]
    printed = benchmark_run("compiling", *flags)
    found = json.loads(output.read_text())["forward"]
    assert 0 < found["generated"] < found["operators"] < found["operators"] + found["generated"] < found["eager"]
    assert len(found["seconds"]) == 2 and found["compiling"] > 0
    assert f"launches {found['eager']} and compiled {found['operators'] + found['generated']}" in printed


def test_mistake_is_told_in_one_sentence():
    with pytest.raises(UserError, match="--rows is 0, but it must be at least 1"):
        compiling.main(["--rows", "0"])
