"""The plan keeps what it says about equal compute and equal updates."""

from importlib import import_module

import pytest

from study.cost import compute_before, compute_per_update, words
from study.settings import IMAGES, Size


def test_table_1_spends_the_same_compute_on_every_method(plan, decode):
    size = Size()
    for label, runs in plan.table_1.items():
        for run in runs:
            each = compute_per_update(run.script, run.flags, decode)
            rounds = run.flags.get("rounds", 1)
            assert run.updates % rounds == 0 and size.compute - rounds * each < run.compute <= size.compute, label
            before = compute_before(run.script, run.flags, decode)
            assert run.compute == pytest.approx(before + run.updates * each)
    assert {run.seed for runs in plan.table_1.values() for run in runs} == {0, 1, 2}
    assert len(plan.table_1) == 10


def test_settling_compares_equal_updates_and_equal_compute(plan):
    for rate in Size().learning_rates:
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
    rate = IMAGES["learning_rate"]
    shown = {runs[0].key for (of, _), runs in plan.settle.items() if of == rate}
    assert validated == shown and len(shown) == 3


def test_every_command_is_understood_and_every_run_has_a_folder_of_its_own(plan, folder):
    runs = plan.runs()
    assert len({run.key for run in runs}) == len(runs)
    for run in runs:
        assert run.key.isidentifier()  # as evaluate.py asks of a model's name
        script = import_module(run.script.replace("/", "."))
        args = script.parse_args(words({**run.flags, "output_dir": folder / "x", "max_train_steps": run.updates}))
        assert args.lr_warmup_steps == max(1, run.updates // run.flags.get("rounds", 1) // 10)


def test_worst_of_n_is_the_same_run_with_the_reward_turned_round(plan):
    best, worst = (plan.selection[f"{which} of 8 noises", "shapes"][0] for which in ("best", "worst"))
    differing = {name for name in best.flags if best.flags[name] != worst.flags[name]}
    assert differing == {"reward_model"} and worst.flags["reward_model"] == "shapes:-1"
    wrong = plan.selection["best of 8 noises", "shapes_wrong"][0]
    assert {name for name in best.flags if best.flags[name] != wrong.flags[name]} == {"train_data_dir"}
