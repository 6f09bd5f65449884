"""The paper's comparisons in miniature: tables 1 to 3 and figures 4 to 6 on the tiny world, in one resumable command.

    bash scripts/study.sh                 # everything, into outputs/study; `docs/study.md` is written about it
    bash scripts/study.sh --quick         # the same plan with a handful of updates and images: does it all run?

Trains every method with the two training scripts, judges every model with `scripts/evaluate.py`, and writes
`tables.md` and the figures. What is done already is not done again; every run is one process with one
thread, so that results do not depend on `--jobs`.
"""

from __future__ import annotations

import argparse
import fcntl
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

from sharpening.arguments import OneSentenceParser, require
from sharpening.errors import UserError, exit_status
from study.plan import (
    METRICS,
    MODEL,
    ON_IMAGES,
    ON_SAMPLES,
    QUICK,
    ROOT,
    SCRIPTS,
    WRONG_CAPTIONS,
    Run,
    Size,
    decode_cost,
    make_plan,
    words,
)
from study.report import Report


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
            RUNNING.discard(process)
    if status:
        said = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()]
        raise Failed(f"{said[-1] if said else 'no output'} ({log})")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or absent."""
    aside = path.with_suffix(".partial")
    aside.write_text(text)
    aside.replace(path)


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
    write_whole(marker, json.dumps({**task, "seconds": seconds, "ended": time.time()}))
    return seconds


def write_data(size: Size, output_dir: Path) -> None:
    """The prompts, and images with their captions, all right and partly wrong."""
    prompts = ["--training_prompts", output_dir / "prompts.txt", "--held_out_prompts"]
    prompts.append(output_dir / "held_out_prompts.txt")
    for name, extra in (("shapes", prompts), ("shapes_wrong", ["--wrong_fraction", WRONG_CAPTIONS])):
        command = ["tiny_world/make_shapes_dataset.py", "--output_dir", output_dir / name, "--num_images", size.data]
        once(output_dir / "data" / name, [[*command, "--seed", 1, *extra]], fresh=[output_dir / name])


def train(run: Run, folder: Path) -> float:
    """Train a run into `folder/model`; returns its seconds."""
    commands, start = [], None
    for index in range(run.rounds):
        target = folder / ("model" if index == run.rounds - 1 else f"round{index}")
        flags = {**run.flags, "max_train_steps": run.updates, "seed": 1000 * index + run.seed, "output_dir": target}
        if start is not None:
            flags["pretrained_model_name_or_path"] = start
        commands.append([f"{SCRIPTS[run.script]}.py", *words(flags)])
        start = target
    return once(folder, commands, fresh=[folder])


def evaluate(models: Mapping[str, tuple[str | Path, str]], folder: Path, images: int) -> float:
    """Judge models, name -> (path, search or nothing), against the base on the held-out prompts; returns the seconds.

    `folder` gets what `evaluate.py` writes, which keeps images by the weights that drew them.
    """
    named = [f"{name}={path}" + (f"@{search}" if search else "") for name, (path, search) in models.items()]
    command = ["scripts/evaluate.py", "--models", f"base={MODEL}", *named]
    command += ["--prompts", "shapes", "--reward_model", "shapes", "--num_images", images, "--batch_size", 100]
    command += ["--guidance_scale", 1, "--grid_images", 9, "--output_dir", folder, "--metrics", *METRICS.values()]
    trained = {Path(path).parent for path, _ in models.values() if path != MODEL}
    return once(folder, [command], fresh=[], inputs=sorted(trained))


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


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags.

    Raises:
        UserError: naming the flag and the remedy.
    """
    parser = OneSentenceParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "study")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time, of 1.5 GB each")
    parser.add_argument("--quick", action="store_true", help="a few updates and images of everything: a rehearsal")
    args = parser.parse_args(argv)
    require(args.jobs >= 1, f"--jobs is {args.jobs}, but it must be at least 1")
    args.output_dir = args.output_dir.expanduser().resolve()
    return args


def main(argv: Sequence[str]) -> int:
    """Train, judge, write; returns the exit status."""
    args = parse_args(argv)
    size, output_dir = QUICK if args.quick else Size(), args.output_dir
    settings = output_dir / "settings.json"
    described = json.dumps(vars(size), default=list)
    require(
        not settings.is_file() or settings.read_text() == described,
        f"--output_dir {output_dir} holds a study of another size; name another folder",
    )
    started = time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--output_dir {output_dir}: another study is writing there; wait for its end") from error
        write_whole(settings, described)
        write_data(size, output_dir)
        plan = make_plan(size, output_dir, decode_cost())
        runs, folder = sorted(plan.runs(), key=lambda run: -run.compute), output_dir / "runs"
        print(f"{len(runs)} runs, {sum(run.compute for run in runs) / 1e6:.2f} million forwards of a row", flush=True)
        tasks = {run.key: lambda run=run: train(run, folder / run.key) for run in runs}
        seconds = sum(in_parallel(args.jobs, tasks, "train").values())

        evaluations = output_dir / "evaluation"
        judged: dict[str, tuple[dict, int]] = {}  # group -> (models, images); searches take longest and go first
        rlhf, sft = (folder / plan.table_1[label][0].key / "model" for label in (ON_SAMPLES, ON_IMAGES))
        for group, name, spec, on_rlhf in plan.search_specs():
            models, _ = judged.setdefault(group, ({}, size.search_images))
            models[name] = (rlhf if on_rlhf else MODEL, spec)
        judged["search_best_of_n"][0].update(rlhf=(rlhf, ""), sft=(sft, ""))
        for group, members in plan.groups().items():
            judged[group] = ({run.key: (folder / run.key / "model", "") for run in members}, size.images)
        tasks = {
            group: lambda group=group, what=what: evaluate(what[0], evaluations / group, what[1])
            for group, what in judged.items()
        }
        seconds += sum(in_parallel(args.jobs, tasks, "judge").values())

        report = Report(plan, size, output_dir)
        tables = report.tables()
        write_whole(output_dir / "tables.md", tables)
        report.draw_figures()
    print(tables)
    took = time.perf_counter() - started
    print(f"{seconds / 3600:.2f} hours of one thread in all; this command took {took:.0f} s")
    print(f"written to {output_dir}: tables.md, figure4.png to figure6.png, branches_and_steps.png")
    return 0


def politely(work: Callable[[], int]) -> int:
    """The exit status of some work. An interruption stops what runs and drops what waits; what is done stays."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        return exit_status(work)
    except Failed as error:
        print(f"error: {error}; the same command goes on with the rest", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(politely(lambda: main(sys.argv[1:])))
