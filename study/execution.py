"""The paper's comparisons in miniature: tables 1 to 3 and figures 4 to 6 on the tiny world, in one resumable command.

    bash scripts/study.sh                 # everything, into outputs/study; `docs/study.md` is written about it
    bash scripts/study.sh --quick         # the same plan with a handful of updates and images: does it all run?

Trains every method with its script, judges every model with `scripts/evaluate.py`, and writes
`tables.md` and the figures. What is done already is not done again; every run is one process with one
thread, so that results do not depend on `--jobs`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from sharpening.errors import UserError, require
from sharpening.files import write_aside
from sharpening.flags import Flag, parse
from study.cost import MODEL, ROOT, decode_cost, words
from study.plan import Plan, Run, make_plan
from study.report import Report
from study.settings import METRICS, ON_IMAGES, ON_SAMPLES, QUICK, WRONG_CAPTIONS, Size
from study.tasks import in_parallel, once

FLAGS = (
    Flag("output_dir", "runs, evaluations, tables and figures", Path, ROOT / "outputs" / "study"),
    Flag("jobs", "processes at a time, of 1.5 GB each", int, os.cpu_count(), "[1, inf)"),
    Flag("quick", "a few updates and images of everything: a rehearsal", bool, False),
)


def write_data(size: Size, output_dir: Path) -> None:
    """The prompts, and images with their captions, all right and partly wrong."""
    prompts = ["--training_prompts", output_dir / "prompts.txt", "--held_out_prompts"]
    prompts.append(output_dir / "held_out_prompts.txt")
    for name, extra in (("shapes", prompts), ("shapes_wrong", ["--wrong_fraction", WRONG_CAPTIONS])):
        command = ["tiny_world/make_shapes_dataset.py", "--output_dir", output_dir / name, "--num_images", size.data]
        once(output_dir / "data" / name, [[*command, "--seed", 1, *extra]], fresh=[output_dir / name])


def train(run: Run, folder: Path) -> float:
    """Train a run into `folder/model`; returns its seconds."""
    flags = {**run.flags, "max_train_steps": run.updates, "seed": run.seed, "output_dir": folder / "model"}
    return once(folder, [[f"{run.script}.py", *words(flags)]], fresh=[folder])


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


def train_all(plan: Plan, folder: Path, jobs: int) -> float:
    """Train every run of the plan, the longest first; returns the seconds of one thread."""
    runs = sorted(plan.runs(), key=lambda run: -run.compute)
    print(f"{len(runs)} runs, {sum(run.compute for run in runs) / 1e6:.2f} million forwards of a row", flush=True)
    tasks = {run.key: partial(train, run, folder / run.key) for run in runs}
    return sum(in_parallel(jobs, tasks, "train").values())


def evaluate_all(plan: Plan, size: Size, runs: Path, folder: Path, jobs: int) -> float:
    """Judge every search and every run, whose models are in `runs`; returns the seconds of one thread."""
    judged: dict[str, tuple[dict, int]] = {}  # group -> (models, images); searches take longest and go first
    rlhf, sft = (runs / plan.table_1[label][0].key / "model" for label in (ON_SAMPLES, ON_IMAGES))
    for group, name, spec, on_rlhf in plan.search_specs():
        models, _ = judged.setdefault(group, ({}, size.search_images))
        models[name] = (rlhf if on_rlhf else MODEL, spec)
    judged["search_best_of_n"][0].update(rlhf=(rlhf, ""), sft=(sft, ""))
    for group, members in plan.groups().items():
        judged[group] = ({run.key: (runs / run.key / "model", "") for run in members}, size.images)
    tasks = {group: partial(evaluate, models, folder / group, images) for group, (models, images) in judged.items()}
    return sum(in_parallel(jobs, tasks, "judge").values())


@contextmanager
def study_folder(folder: Path, size: Size) -> Iterator[None]:
    """`folder`, for one study at a time, and always of one size.

    Raises:
        UserError: it holds a study of another size, or another study is writing there.
    """
    settings, described = folder / "settings.json", json.dumps(vars(size), default=list)
    require(
        not settings.is_file() or settings.read_text() == described,
        f"--output_dir {folder} holds a study of another size; name another folder",
    )
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"--output_dir {folder}: another study is writing there; wait for its end") from error
    with write_aside(settings) as aside:
        aside.write_text(described)
    try:
        yield
    finally:
        lock.release()


def main(argv: Sequence[str]) -> int:
    """Train, judge, write; returns the exit status.

    Raises:
        UserError: naming the flag and the remedy.
        Failed: a run or an evaluation did not end well.
    """
    args = parse("The paper's comparisons in miniature, on the tiny world.", {"study": FLAGS}, argv)
    size, output_dir = QUICK if args.quick else Size(), args.output_dir.expanduser().resolve()
    started = time.perf_counter()
    with study_folder(output_dir, size):
        write_data(size, output_dir)
        plan = make_plan(size, output_dir, decode_cost())
        seconds = train_all(plan, output_dir / "runs", args.jobs)
        seconds += evaluate_all(plan, size, output_dir / "runs", output_dir / "evaluation", args.jobs)
        report = Report(plan, size, output_dir)
        tables = report.tables()
        with write_aside(output_dir / "tables.md") as aside:
            aside.write_text(tables)
        report.draw_figures()
    print(tables)
    took = time.perf_counter() - started
    print(f"{seconds / 3600:.2f} hours of one thread in all; this command took {took:.0f} s")
    print(f"written to {output_dir}: tables.md, figure4.png to figure6.png, branches_and_steps.png")
    return 0
