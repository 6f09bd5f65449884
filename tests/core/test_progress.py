"""Progress bars: one, of the main process."""

import os
import subprocess
import sys
import termios

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


def test_what_cannot_be_counted_is_a_line_of_a_log():
    code = (
        "from sharpening.progress import underway\nwith underway('loading unet'):\n    print('meanwhile', flush=True)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.stdout == "loading unet ...\nmeanwhile\n"


def test_what_cannot_be_counted_is_named_on_a_terminal_while_it_lasts():
    code = (
        "from sharpening.progress import underway\nwith underway('loading unet'):\n    print('meanwhile', flush=True)"
    )
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(ours, "rb") as screen:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=theirs, stderr=theirs, check=True)
        os.close(theirs)
        before, after = os.read(screen.fileno(), 10_000).decode().split("meanwhile")
    assert "loading unet ..." in before and not after.strip()


@pytest.mark.parametrize(
    "work", ["with underway('saving'): raise KeyError('why')", "list(progress(range(3))); raise KeyError('why')"]
)
def test_a_full_disk_under_the_log_neither_ends_nor_hides_anything(work):
    code = "import sys\nfrom sharpening.progress import progress, underway\nsys.stderr = open('/dev/full', 'w', 1)\n"
    code += f"try:\n    exec({work!r})\nexcept KeyError:\n    print('said', flush=True)\nimport os; os._exit(0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "said\n"
