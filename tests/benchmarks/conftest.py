"""How tests start a benchmark."""

import subprocess
import sys

import pytest

from tests.support.runs import ROOT


@pytest.fixture
def benchmark_run():
    """Run a benchmark by name with flags, in a process of its own."""

    def run(name, *flags):
        command = [sys.executable, f"benchmarks/{name}.py", *map(str, flags)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    return run
