"""The study: its plan keeps what it says about equal compute and equal updates, and a rehearsal of all of it runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module

import numpy as np
import pytest

from sharpening.errors import UserError
from study import execution as study
from study import plan as study_plan
from study import report as study_report
from tests.support.runs import ROOT
from tiny_world.shapes import training_captions

DECODE = 0.62


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the flags of the runs name: a few images and the prompts."""
    from tiny_world.make_shapes_dataset import write_dataset, write_prompts

    folder = tmp_path_factory.mktemp("study")
    write_dataset(folder / "shapes", num_images=9)
    write_dataset(folder / "shapes_wrong", num_images=9, wrong_fraction=study_plan.WRONG_CAPTIONS)
    write_prompts(folder / "prompts.txt", "training")
    write_prompts(folder / "held_out_prompts.txt", "held_out")
    return folder


@pytest.fixture(scope="module")
def plan(folder):
    return study_plan.make_plan(study_plan.Size(), folder, DECODE)


def test_table_1_spends_the_same_compute_on_every_method(plan):
    size = study_plan.Size()
    for label, runs in plan.table_1.items():
        for run in runs:
            each = study_plan.compute_per_update(run.script, run.flags, DECODE)
            assert size.compute - run.rounds * each < run.compute <= size.compute, label
            assert run.compute == pytest.approx(
                run.rounds * (study_plan.compute_before(run.flags, DECODE) + run.updates * each)
            )
    assert {run.seed for runs in plan.table_1.values() for run in runs} == {0, 1, 2}
    assert len(plan.table_1) == 9


@pytest.mark.parametrize(
    ("script", "changes", "per_prompt"),
    [
        ("sft", {"num_noisy_latents": 2, "trajectory_nums": 3}, 2 * 3 * (1 + DECODE) + 3 * 3),
        ("sft", {"num_noisy_latents": 1, "trajectory_nums": 1}, 3),  # standard fine-tuning scores nothing
        ("rlhf", {**study_plan.SAMPLES, "trajectory_nums": 2}, 4 * (10 + DECODE) + 2 * (2 + 2 + 2 * 3)),
        # With m = 1 the gradient's own forward tells the errors of the pair.
        ("rlhf", study_plan.SAMPLES, 4 * (10 + DECODE) + 2 + 2 * 3),
        ("rlhf", {**study_plan.SAMPLES, "train_on": "best"}, 4 * (10 + DECODE) + 3),
        ("rlhf", {**study_plan.SAMPLES, "generate_with": "reference", "reference_sets": 2}, 2 + 2 * 3),
    ],
    ids=["branches", "one noise", "pairs of paths", "pairs", "best", "fixed pairs"],
)
def test_compute_is_what_the_method_needs(script, changes, per_prompt):
    flags = {"pretrained_model_name_or_path": study_plan.MODEL, "reward_model": "shapes", "train_batch_size": 5}
    flags |= {"train_data_dir": "tests", **changes}
    assert study_plan.compute_per_update(script, flags, DECODE) == pytest.approx(5 * per_prompt)
    before = len(training_captions()) * 2 * 4 * (10 + DECODE) if "reference_sets" in changes else 0
    assert study_plan.compute_before(flags, DECODE) == pytest.approx(before)


def test_settling_compares_equal_updates_and_equal_compute(plan):
    for rate in study_plan.Size().learning_rates:
        sharpened, updates, compute = (
            plan.settle[rate, label][0] for label in dict.fromkeys(n for _, n in plan.settle)
        )
        assert sharpened.updates == updates.updates < compute.updates
        assert compute.compute == pytest.approx(sharpened.compute, rel=1e-3)
        assert {run.flags["learning_rate"] for run in (sharpened, updates, compute)} == {rate}


def test_sweeps_vary_one_flag_at_equal_updates(plan):
    for sweep in plan.sweeps:
        flag = {"n": "num_noisy_latents", "m": "trajectory_nums"}[sweep.flag]
        runs = [run for runs in sweep.runs.values() for run in runs]
        assert len({run.updates for run in runs}) == 1
        assert [runs[0].flags[flag] for runs in sweep.runs.values()] == list(sweep.runs)
        varied = (flag, "validation_steps")  # the latter changes nothing that is learned
        others = [{k: v for k, v in run.flags.items() if k not in varied} for run in runs if run.seed == 0]
        assert all(other == others[0] for other in others)
    assert [list(sweep.runs) for sweep in plan.sweeps] == [[1, 2, 3, 4, 8], [2, 3, 4, 8], *[[1, 2, 3, 4, 8]] * 2]


def test_only_what_figure_4_shows_over_time_is_validated_in_training(plan):
    validated = {run.key for run in plan.runs() if run.flags["validation_steps"]}
    rate = study_plan.IMAGES["learning_rate"]
    shown = {runs[0].key for (of, _), runs in plan.settle.items() if of == rate}
    assert validated == shown and len(shown) == 3


def test_every_command_is_understood_and_every_run_has_a_folder_of_its_own(plan, folder):
    runs = plan.runs()
    assert len({run.key for run in runs}) == len(runs)
    for run in runs:
        assert run.key.isidentifier()  # as evaluate.py asks of a model's name
        script = import_module(study_plan.SCRIPTS[run.script])
        args = script.parse_args(
            study_plan.words({**run.flags, "output_dir": folder / "x", "max_train_steps": run.updates})
        )
        assert args.lr_warmup_steps == max(1, run.updates // 10)


def test_worst_of_n_is_the_same_run_with_the_reward_turned_round(plan):
    best, worst = (plan.selection[f"{which} of 8 noises", "shapes"][0] for which in ("best", "worst"))
    differing = {name for name in best.flags if best.flags[name] != worst.flags[name]}
    assert differing == {"reward_model"} and worst.flags["reward_model"] == "shapes:-1"
    wrong = plan.selection["best of 8 noises", "shapes_wrong"][0]
    assert {name for name in best.flags if best.flags[name] != wrong.flags[name]} == {"train_data_dir"}


def test_work_is_done_once_and_again_when_command_or_input_changes(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "calls"
    script.write_text(f"import sys; open({str(out)!r}, 'a').write(sys.argv[1])")
    first, second = tmp_path / "first", tmp_path / "second"
    left = first / "left"

    def work(word):
        study.once(first, [[script, word]], fresh=[first])
        left.mkdir(exist_ok=True)
        study.once(second, [[script, "judge "]], fresh=[], inputs=[first])

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
    tasks = {
        name: lambda name=name: study.once(tmp_path / name, [[tmp_path / f"{name}.py"]], fresh=[])
        for name in ("bad", "good")
    }
    with pytest.raises(study.Failed, match=r"bad: error: --flag is wrong \(.*bad/log0.txt\)"):
        study.in_parallel(1, tasks, "train")
    assert not (tmp_path / "bad" / "finished.json").exists() and (tmp_path / "good" / "finished.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_stops_what_runs_and_drops_what_waits(number, tmp_path):
    """A study of tasks that sleep: after the signal nothing goes on, not even a process of its own."""
    (tmp_path / "sleep.py").write_text(
        f"import os, time; open({str(tmp_path)!r} + f'/pid{{os.getpid()}}', 'w').close(); time.sleep(60)"
    )
    driver = tmp_path / "driver.py"
    driver.write_text(
        f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from study import execution as study
folder = Path({str(tmp_path)!r})
tasks = {{str(i): lambda i=i: study.once(folder / str(i), [[folder / "sleep.py"]], fresh=[]) for i in range(5)}}
sys.exit(study.politely(lambda: study.in_parallel(1, tasks, "train")))
"""
    )
    process = subprocess.Popen([sys.executable, str(driver)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (started := list(tmp_path.glob("pid*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(timeout=20)
    assert process.returncode == 128 + number
    assert len(list(tmp_path.glob("pid*"))) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(started[0].name[3:]), 0)


@pytest.mark.parametrize(
    ("flags", "words"), [(["--jobs", "0"], "--jobs is 0"), (["--quik"], "--quik")], ids=["no job", "unknown flag"]
)
def test_bad_flags_are_refused(flags, words):
    with pytest.raises((UserError, SystemExit)) as refusal:
        study.main(flags)
    assert words in str(refusal.value)


def test_a_folder_of_another_size_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(UserError, match=r"--output_dir .* holds a study of another size"):
        study.main(["--quick", "--output_dir", str(tmp_path)])


def test_the_error_of_a_gain_counts_seeds_and_images():
    comparisons = [{"gain": value, "gain_standard_error": 0.3} for value in (1.0, 2.0, 6.0)]
    mean, error = study_report.gain(comparisons)
    assert (mean, error) == (3.0, pytest.approx((np.var([1, 2, 6], ddof=1) / 3 + 0.09) ** 0.5))
    assert study_report.signed(comparisons[:1]) == "+1.000 ± 0.300*"


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
@pytest.mark.timeout(900)
def test_rehearsal_writes_every_table_and_figure_and_resumes(tmp_path):
    from PIL import Image

    command = [sys.executable, "study/execution.py", "--quick", "--output_dir", str(tmp_path / "study")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "study"
    tables = (out / "tables.md").read_text()
    assert re.findall("^## (.*)$", tables, re.MULTILINE) == [
        "Table 1: equal compute",
        "Learning rates of table 1, seed 0",
        "SFT sharpening against standard fine-tuning",
        "SFT, branches n (m = 1)",
        "RLHF on samples, branches n (m = 1)",
        "SFT, steps m (n = 2)",
        "RLHF on samples, steps m (n = 2)",
        "What selection over noises does",
        "Figure 5: search at inference (9 images)",
    ]
    assert "nan" not in tables and tables in first.stdout
    summary = json.loads((out / "evaluation" / "search_demon" / "summary.json").read_text())
    assert summary["models"]["demon_2"]["nfe"] == 25 + 24 * 2
    assert "base" in summary["metrics"][study_plan.METRICS["likeness"]]
    for name in ("figure4", "figure5", "figure6", "branches_and_steps"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
    (out / "runs" / "table1_rlhf_s0" / "finished.json").unlink()  # as if it had been interrupted
    markers = {path: path.stat().st_mtime_ns for path in out.glob("*/*/finished.json")}
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    again = {path.parent.name for path, then in markers.items() if path.stat().st_mtime_ns != then}
    assert again == {"table1_s0", "search_best_of_n"}  # the evaluations of the run that was done again
    assert (out / "tables.md").read_text() == tables
