"""What is written aside is whole or absent, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from sharpening.files import write_aside
from tests.support.runs import ROOT


def test_a_file_is_replaced_at_the_end_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with write_aside(path) as aside:
            aside.write_text(text)
            assert aside.parent == path.parent and (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_takes_the_place_of_an_empty_one_but_of_no_other(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with write_aside(folder) as aside:
        aside.mkdir()
        (aside / "file").write_text("kept")
    with pytest.raises(OSError), write_aside(folder) as aside:
        aside.mkdir()
    assert (folder / "file").read_text() == "kept" and list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("shared", [False, True])
def test_a_failure_changes_nothing(shared, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyError), write_aside(path, shared) as aside:
        aside.write_text("half")
        raise KeyError
    with pytest.raises(OSError), write_aside(path, shared):
        pass  # nothing was made
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("make", ["aside.write_text('half')", "aside.mkdir(); (aside / 'file').write_text('half')"])
def test_a_kill_leaves_nothing_that_looks_whole_and_the_next_writer_clears_up(make, tmp_path):
    path = tmp_path / "result"
    code = f"""
import os, pathlib
from sharpening.files import write_aside
with write_aside(pathlib.Path({str(path)!r})) as aside:
    {make}
    os.kill(os.getpid(), {int(signal.SIGKILL)})
"""
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name == ".result.partial"
    with write_aside(path) as aside:
        aside.write_text("whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_shared_file_do_not_disturb_each_other(tmp_path):
    path, texts, both = tmp_path / "file.txt", ["a" * 1000, "b" * 2000], threading.Barrier(2)

    def write(text):
        with write_aside(path, shared=True) as aside, aside.open("w") as file:
            both.wait(10)
            file.write(text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and list(tmp_path.iterdir()) == [path]
