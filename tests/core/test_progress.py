"""Progress bars: one, of the main process."""

import os
import subprocess
import sys

import pytest

from tests.support.runs import ROOT, launcher_words

WORK = """
import torch
from sharpening.progress import progress

torch.distributed.init_process_group("gloo")
assert list(progress(range(3), desc="working", unit="row")) == [0, 1, 2]
torch.distributed.barrier()
"""


def test_one_process_shows_its_bar_with_a_rate():
    code = "from sharpening.progress import progress\nlist(progress(range(3), desc='working', unit='row'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "working: 100%" in result.stderr and "row/s" in result.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_of_two_processes_one_shows_its_bar(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*launcher_words("torchrun"), str(tmp_path / "work.py")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("working: 100%") == 1


def test_what_cannot_be_counted_is_named_while_it_lasts():
    code = (
        "from sharpening.progress import underway\nwith underway('loading unet'):\n    print('meanwhile', flush=True)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    before, after = result.stdout.split("meanwhile")
    assert "loading unet ..." in before and after.strip(" \r\n") == ""
