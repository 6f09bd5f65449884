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


@pytest.mark.parametrize(("seconds", "said"), [(2.5, ["loading unet ...", "done"]), (0, ["done"])])
def test_what_cannot_be_counted_is_named_if_it_takes_long(seconds, said):
    code = "import sys, time\nfrom sharpening.progress import underway\n"
    code += f"with underway('loading unet'):\n    time.sleep({seconds})\nprint('done', file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr.splitlines() == said


@pytest.mark.parametrize(
    "work",
    [
        "with underway('saving'): time.sleep(2.2); raise KeyError('why')",
        "list(progress(range(3))); raise KeyError('why')",
    ],
)
def test_a_full_disk_under_the_log_neither_ends_nor_hides_anything(work):
    code = "import sys, time\nfrom sharpening.progress import progress, underway\n"
    code += "sys.stderr = open('/dev/full', 'w', 1)\n"
    code += f"try:\n    exec({work!r})\nexcept KeyError:\n    print('said', flush=True)\nimport os; os._exit(0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "said\n"
