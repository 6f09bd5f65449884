"""Commands that are run once, and several at a time: what is done already is not done again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from sharpening.errors import exit_status
from sharpening.files import write_aside
from study.cost import ROOT


class Failed(RuntimeError):
    """A run or an evaluation that did not end well."""


RUNNING: set[subprocess.Popen] = set()


def execute(command: Sequence[str], log: Path) -> None:
    """Run a Python command with one thread, its output into `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        RUNNING.add(process)
        try:
            status = process.wait()
        finally:
            if process.poll() is None:  # interrupted here, and not in `in_parallel`
                process.terminate()
                process.wait()
            RUNNING.discard(process)
    if status:
        said = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()]
        raise Failed(f"{said[-1] if said else 'no output'} ({log})")


def once(
    folder: Path, commands: Sequence[Sequence[object]], fresh: Sequence[Path], inputs: Sequence[Path] = ()
) -> float:
    """Run commands unless the same ones have ended well on the same inputs; returns their seconds.

    `folder` holds their logs and `finished.json`, which is written last. `fresh` are removed before they run, `inputs`
    are the folders of what they read, known by their own `finished.json`.
    """
    marker = folder / "finished.json"
    task = {
        "commands": [[str(word) for word in command] for command in commands],
        "inputs": [(path / "finished.json").read_text() for path in inputs],
    }
    if marker.is_file():
        finished = json.loads(marker.read_text())
        if {name: finished[name] for name in task} == task:
            return finished["seconds"]
        marker.unlink()
    for path in fresh:
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for index, command in enumerate(task["commands"]):
        execute(command, folder / f"log{index}.txt")
    seconds = time.perf_counter() - started
    with write_aside(marker) as aside:
        aside.write_text(json.dumps({**task, "seconds": seconds, "ended": time.time()}))
    return seconds


def in_parallel(jobs: int, tasks: Mapping[str, Callable[[], float]], what: str) -> dict[str, float]:
    """Run tasks, `jobs` at a time; returns their seconds. An interruption drops those that wait.

    Raises:
        Failed: naming those that did not end well, after the others have.
    """
    seconds, failures = {}, []
    pool = ThreadPoolExecutor(jobs)
    try:
        names = {pool.submit(task): name for name, task in tasks.items()}
        for count, future in enumerate(as_completed(names), 1):
            name = names[future]
            try:
                seconds[name] = future.result()
                print(f"[{what} {count}/{len(tasks)}] {name}: {seconds[name]:.0f} s", flush=True)
            except Failed as error:
                failures.append(f"{name}: {error}")
                print(f"[{what} {count}/{len(tasks)}] {name} FAILED", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):  # none, but after an interruption
            process.terminate()
    if failures:
        raise Failed("; ".join(failures))
    return seconds


def politely(work: Callable[[], int]) -> int:
    """The exit status of some work. An interruption stops what runs and drops what waits; what is done stays."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        return exit_status(work)
    except Failed as error:
        print(f"error: {error}; the same command tries this again, and then goes on", file=sys.stderr)
        return 1
