"""The paper's comparisons in miniature: tables 1 to 3 and figures 4 to 6 on the tiny world, in one resumable command.

    bash scripts/study.sh                 # everything, into outputs/study; `docs/study.md` is written about it
    bash scripts/study.sh --table_1       # table 1 alone; the first command then goes on from there
    bash scripts/study.sh --quick         # the same plan with a handful of updates and images: does it all run?

Tunes every method of table 1, trains every run with its script, judges every model with `scripts/evaluate.py`, and
writes tables, figures and `gallery.html`. What is done already is not done again; every run is one process with one
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
from sharpening.files import check_writable, write_aside
from sharpening.flags import Flag, parse
from study.cost import MODEL, ROOT, decode_cost, words
from study.methods import EFFICIENT_RLHF, ON_IMAGES, Setting
from study.plan import Plan, Planner, Run, Tuning, groups_of, make_plan
from study.report import Report
from study.settings import METRICS, QUICK, WRONG_CAPTIONS, Size
from study.tasks import in_parallel, once
from tiny_world.make_shapes_dataset import write_prompts

FLAGS = (
    Flag("output_dir", "runs, evaluations, tables and figures", Path, ROOT / "outputs" / "study"),
    Flag("jobs", "processes at a time, of 1.5 GB each", int, os.cpu_count(), "[1, inf)"),
    Flag("quick", "a few updates and images of everything: a rehearsal", bool, False),
    Flag("table_1", "table 1 alone, with its tuning and its figure", bool, False),
)
PROMPT_FILES = {  # set of captions -> file
    "training": "prompts.txt", "held_out": "held_out_prompts.txt", "study": "study_prompts.txt",
    "judged": "judged_prompts.txt",
}  # fmt: skip


def write_data(size: Size, output_dir: Path) -> None:
    """The prompts, and images with their captions: all right, partly wrong, and of the prompts of table 1."""
    for captions, name in PROMPT_FILES.items():
        write_prompts(output_dir / name, captions)
    folders = {
        "shapes": (),
        "shapes_wrong": ("--wrong_fraction", WRONG_CAPTIONS),
        "shapes_study": ("--captions", "study"),
    }
    for name, extra in folders.items():
        command = ["tiny_world/make_shapes_dataset.py", "--output_dir", output_dir / name, "--num_images", size.data]
        once(output_dir / "data" / name, [[*command, "--seed", 1, *extra]], fresh=[output_dir / name])


def train(run: Run, folder: Path, inputs: Sequence[Path] = ()) -> float:
    """Train a run into `folder/model`; returns its seconds. inputs as of `once`."""
    flags = {**run.flags, "max_train_steps": run.updates, "seed": run.seed, "output_dir": folder / "model"}
    return once(folder, [[f"{run.script}.py", *words(flags)]], [folder], inputs)


def evaluate(
    models: Mapping[str, tuple[str | Path, str]],
    folder: Path,
    images: int,
    prompts: Path,
    base: str | Path = MODEL,
    reward: str = "shapes",
    metrics: Sequence[str] = tuple(METRICS.values()),
) -> float:
    """Judge models, name -> (path, search or nothing), against the base on a file of prompts; returns the seconds.

    `folder` gets what `evaluate.py` writes, which keeps images by the weights that drew them.
    """
    named = [f"{name}={path}" + (f"@{search}" if search else "") for name, (path, search) in models.items()]
    command = ["scripts/evaluate.py", "--models", f"base={base}", *named]
    command += ["--prompts", prompts, "--reward_model", reward, "--num_images", images, "--batch_size", 100]
    command += ["--guidance_scale", 1, "--grid_images", 9, "--output_dir", folder, "--metrics", *metrics]
    made = {Path(path).parent for path in (base, *(path for path, _ in models.values())) if path != MODEL}
    return once(folder, [command], fresh=[], inputs=sorted(made))


def train_all(runs: Sequence[Run], folder: Path, jobs: int, what: str, inputs: Sequence[Path] = ()) -> float:
    """Train runs, a seed after the other and the longest first; returns the seconds of one thread. inputs as of
    `once`."""
    runs = sorted(runs, key=lambda run: (run.seed, -run.compute))
    print(f"{len(runs)} runs, {sum(run.compute for run in runs) / 1e6:.2f} million forwards of a row", flush=True)
    tasks = {run.key: partial(train, run, folder / run.key, inputs) for run in runs}
    return sum(in_parallel(jobs, tasks, what).values())


def evaluate_all(tasks: Mapping[str, tuple[dict, int, Path]], folder: Path, jobs: int, what: str) -> float:
    """Judge groups of models, (models, images, prompts) as of `evaluate`; returns the seconds of one thread."""
    judging = {group: partial(evaluate, models, folder / group, *how) for group, (models, *how) in tasks.items()}
    return sum(in_parallel(jobs, judging, what).values())


def choose(tuning: Tuning, evaluation: Path) -> dict[str, Setting]:
    """The setting of every method that gained most on the prompts it was tuned on."""
    summaries = {group: json.loads((evaluation / group / "summary.json").read_text()) for group in tuning.groups()}
    group_of, chosen = groups_of(tuning.groups()), {}

    def reward(run: Run) -> float:
        return summaries[group_of[run.key]]["metrics"]["shapes"][run.key]["mean"]

    for label, tried in tuning.tried.items():
        chosen[label] = max(tried, key=lambda setting: reward(tried[setting]))
    return chosen


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
    check_writable("output_dir", folder)
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
    runs, evaluation, seconds, started = output_dir / "runs", output_dir / "evaluation", 0.0, time.perf_counter()

    def of(groups: Mapping[str, Sequence[Run]], images: int, prompts: str) -> dict[str, tuple[dict, int, Path]]:
        return {
            group: ({run.key: (runs / run.key / "model", "") for run in members}, images, output_dir / prompts)
            for group, members in groups.items()
        }

    with study_folder(output_dir, size):
        write_data(size, output_dir)
        planner = Planner(size, output_dir, decode_cost())
        tuning = planner.tuning()
        seconds += train_all(tuning.runs(), runs, args.jobs, "tune")
        tuned_by = of(tuning.groups(), size.tuning_images, "held_out_prompts.txt")
        seconds += evaluate_all(tuned_by, evaluation, args.jobs, "compare settings")
        plan = make_plan(planner, choose(tuning, evaluation))
        # Table 1 first: it is what the study is for.
        seconds += train_all(plan.first_runs(), runs, args.jobs, "train")
        judged = of(plan.first_groups(), size.images, "judged_prompts.txt")
        seconds += evaluate_all(judged, evaluation, args.jobs, "judge")
        if not args.table_1:
            seconds += train_all(plan.other_runs(), runs, args.jobs, "train")
            others = searches(plan, size, runs, output_dir / "judged_prompts.txt")
            others |= of(plan.other_groups(), size.images, "held_out_prompts.txt")
            seconds += evaluate_all(others, evaluation, args.jobs, "judge")
        report = Report(tuning, plan, size, output_dir, planner.decode)
        tables = report.write(args.table_1)
    print(tables)
    took = time.perf_counter() - started
    print(f"{seconds / 3600:.2f} hours of one thread in all; this command took {took:.0f} s")
    print(f"written to {output_dir}: tables.md, tables/*.csv, the figures, and all of it in gallery.html")
    return 0


def searches(plan: Plan, size: Size, runs: Path, prompts: Path) -> dict[str, tuple[dict, int, Path]]:
    """What `evaluate_all` needs to judge every search at inference, beside the models that need none."""
    judged: dict[str, dict[str, tuple[str | Path, str]]] = {}
    rlhf, sft = (runs / plan.largest[label][0].key / "model" for label in (EFFICIENT_RLHF, ON_IMAGES))
    for group, name, spec, on_rlhf in plan.search_specs():
        judged.setdefault(group, {})[name] = (rlhf if on_rlhf else MODEL, spec)
    judged["search_best_of_n"].update(rlhf=(rlhf, ""), sft=(sft, ""))
    return {group: (models, size.search_images, prompts) for group, models in judged.items()}
