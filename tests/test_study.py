"""The study: its plan keeps what it says about equal compute and equal updates, and a rehearsal of all of it runs."""

import json
import re
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from conftest import ROOT

from scripts import study
from sharpening.errors import UserError
from sharpening.shapes import training_captions

DECODE = 0.62


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the flags of the runs name: a few images and the prompts."""
    from scripts.make_shapes_dataset import write_dataset, write_prompts

    folder = tmp_path_factory.mktemp("study")
    write_dataset(folder / "shapes", num_images=9)
    write_prompts(folder / "prompts.txt", "training")
    write_prompts(folder / "held_out_prompts.txt", "held_out")
    return folder


@pytest.fixture(scope="module")
def plan(folder):
    return study.make_plan(study.Size(), folder, DECODE)


def test_table_1_spends_the_same_compute_on_every_method(plan):
    size = study.Size()
    for label, runs in plan.table_1.items():
        for run in runs:
            each = study.compute_per_update(run.script, run.flags, DECODE)
            assert size.compute - run.rounds * each < run.compute <= size.compute, label
            assert run.compute == pytest.approx(
                run.rounds * (study.compute_before(run.flags, DECODE) + run.updates * each)
            )
    assert {run.seed for runs in plan.table_1.values() for run in runs} == {0, 1, 2}
    assert len(plan.table_1) == 9


@pytest.mark.parametrize(
    ("script", "changes", "per_prompt"),
    [
        ("sft", {"num_noisy_latents": 2, "trajectory_nums": 3}, 2 * 3 * (1 + DECODE) + 3 * 3),
        ("sft", {"num_noisy_latents": 1, "trajectory_nums": 1}, 3),  # standard fine-tuning scores nothing
        ("rlhf", study.SAMPLES, 4 * (10 + DECODE) + 2 + 2 + 2 * 3),
        ("rlhf", {**study.SAMPLES, "train_on": "best"}, 4 * (10 + DECODE) + 3),
        ("rlhf", {**study.SAMPLES, "generate_with": "reference", "reference_sets": 2}, 2 + 2 + 2 * 3),
    ],
    ids=["branches", "one noise", "pairs", "best", "fixed pairs"],
)
def test_compute_is_what_the_method_needs(script, changes, per_prompt):
    flags = {"pretrained_model_name_or_path": study.MODEL, "reward_model": "shapes", "train_batch_size": 5}
    flags |= {"train_data_dir": "tests", **changes}
    assert study.compute_per_update(script, flags, DECODE) == pytest.approx(5 * per_prompt)
    before = len(training_captions()) * 2 * 4 * (10 + DECODE) if "reference_sets" in changes else 0
    assert study.compute_before(flags, DECODE) == pytest.approx(before)


def test_settling_compares_equal_updates_and_equal_compute(plan):
    for rate in study.Size().learning_rates:
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
        others = [{k: v for k, v in run.flags.items() if k != flag} for run in runs if run.seed == 0]
        assert all(other == others[0] for other in others)
    assert [list(sweep.runs) for sweep in plan.sweeps] == [[1, 2, 3, 4, 8], [2, 3, 4, 8], *[[1, 2, 3, 4, 8]] * 2]


def test_every_command_is_understood_and_every_run_has_a_folder_of_its_own(plan, folder):
    runs = plan.runs()
    assert len({run.key for run in runs}) == len(runs)
    for run in runs:
        assert run.key.isidentifier()  # as evaluate.py asks of a model's name
        script = import_module(study.SCRIPTS[run.script])
        args = script.parse_args(
            study.words({**run.flags, "output_dir": folder / "x", "max_train_steps": run.updates})
        )
        assert args.lr_warmup_steps == max(1, run.updates // 10)


def test_worst_of_n_is_the_same_run_with_the_reward_turned_round(plan):
    best, worst = plan.selection["best of 8 noises"][0], plan.selection["worst of 8 noises"][0]
    differing = {name for name in best.flags if best.flags[name] != worst.flags[name]}
    assert differing == {"reward_model"} and worst.flags["reward_model"] == "shapes:-1"


def test_a_run_is_done_once_and_again_when_its_command_changes(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "calls"
    script.write_text(f"import sys; open({str(out)!r}, 'a').write(sys.argv[1])")
    for word in ("a", "a", "b", "b"):
        study.once(tmp_path / "run", [[script, word]])
    assert out.read_text() == "ab"


def test_a_failure_names_the_log_and_lets_the_others_end(tmp_path, capsys):
    bad, good = tmp_path / "bad.py", tmp_path / "good.py"
    bad.write_text("raise SystemExit('error: --flag is wrong')")
    good.write_text("")
    tasks = {
        name: lambda name=name: study.once(tmp_path / name, [[tmp_path / f"{name}.py"]]) for name in ("bad", "good")
    }
    with pytest.raises(study.Failed, match=r"bad: error: --flag is wrong \(.*bad/log0.txt\)"):
        study.in_parallel(1, tasks, "train")
    assert not (tmp_path / "bad" / "finished.json").exists() and (tmp_path / "good" / "finished.json").exists()


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


def test_over_seeds():
    mean, error = study.over_seeds([1.0, 2.0, 6.0])
    assert (mean, error) == (3.0, pytest.approx(np.std([1, 2, 6], ddof=1) / 3**0.5))
    assert study.signed([0.25]) == "+0.250"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_writes_every_table_and_figure_and_resumes(tmp_path):
    from PIL import Image

    command = [sys.executable, "scripts/study.py", "--quick", "--output_dir", str(tmp_path / "study")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "study"
    tables = (out / "tables.md").read_text()
    assert re.findall("^## (.*)$", tables, re.MULTILINE) == [
        "Table 1: equal compute",
        "SFT sharpening against standard fine-tuning",
        "SFT, branches n (m = 1)",
        "RLHF on samples, branches n (m = 1)",
        "SFT, steps m (n = 2)",
        "RLHF on samples, steps m (n = 2)",
        "What selection over noises does",
        "Figure 5: search at inference",
    ]
    assert "nan" not in tables and tables in first.stdout
    summary = json.loads((out / "evaluation" / "search_demon" / "summary.json").read_text())
    assert summary["models"]["demon_2"]["nfe"] == 25 + 24 * 2
    for name in ("figure4", "figure5", "figure6", "branches_and_steps"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
    results = (out / "results.json").read_text()
    (out / "runs" / "table1_rlhf_s0" / "finished.json").unlink()  # as if it had been interrupted
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    again, before = (
        {k: v for k, v in json.loads(text).items() if k != "process_seconds"}
        for text in ((out / "results.json").read_text(), results)
    )
    assert again == before
