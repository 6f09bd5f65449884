"""Commands are run once; failures and interruptions leave what is done."""

import os
import signal
import subprocess
import sys
import time

import pytest

from study import tasks
from tests.support.runs import ROOT


def test_work_is_done_once_and_again_when_command_or_input_changes(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "calls"
    script.write_text(f"import sys; open({str(out)!r}, 'a').write(sys.argv[1])")
    first, second = tmp_path / "first", tmp_path / "second"
    left = first / "left"

    def work(word):
        tasks.once(first, [[script, word]], fresh=[first])
        left.mkdir(exist_ok=True)
        tasks.once(second, [[script, "judge "]], fresh=[], inputs=[first])

    work("a "), work("a ")
    assert out.read_text() == "a judge "
    work("b ")  # what was made of the old one is made again
    assert out.read_text() == "a judge b judge "
    (first / "finished.json").unlink()  # interrupted: what it left is removed
    (left / "rest").write_text("")
    work("b ")
    assert out.read_text() == "a judge b judge b judge " and not (left / "rest").exists()


def test_a_failure_names_the_log_and_lets_the_others_end(tmp_path, capsys):
    bad, good = tmp_path / "bad.py", tmp_path / "good.py"
    bad.write_text("raise SystemExit('error: --flag is wrong')")
    good.write_text("")
    work = {
        name: lambda name=name: tasks.once(tmp_path / name, [[tmp_path / f"{name}.py"]], fresh=[])
        for name in ("bad", "good")
    }
    with pytest.raises(tasks.Failed, match=r"bad: error: --flag is wrong \(.*bad/log0.txt\)"):
        tasks.in_parallel(1, work, "train")
    assert not (tmp_path / "bad" / "finished.json").exists() and (tmp_path / "good" / "finished.json").exists()


WORK = {
    "one after the other": 'tasks.once(folder / "0", [[folder / "sleep.py"]], fresh=[])',
    "side by side": """tasks.in_parallel(
    1, {str(i): lambda i=i: tasks.once(folder / str(i), [[folder / "sleep.py"]], fresh=[]) for i in range(5)}, "train"
)""",
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_stops_what_runs_and_drops_what_waits(number, work, tmp_path):
    """A study of tasks that sleep: after the signal nothing goes on, not even a process of its own."""
    (tmp_path / "sleep.py").write_text(
        f"import os, time; open({str(tmp_path)!r} + f'/pid{{os.getpid()}}', 'w').close(); time.sleep(60)"
    )
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"""
import sys
from pathlib import Path
from study import tasks
folder = Path({str(tmp_path)!r})
sys.exit(tasks.politely(lambda: {work}))
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(driver)], stderr=subprocess.PIPE, env=environment)
    deadline = time.monotonic() + 60
    while not (started := list(tmp_path.glob("pid*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(timeout=20)
    assert process.returncode == 128 + number
    assert len(list(tmp_path.glob("pid*"))) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(started[0].name[3:]), 0)
