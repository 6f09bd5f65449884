"""The plan keeps what it says about equal compute and equal updates."""

from importlib import import_module

import pytest

from study.cost import compute_before, compute_per_update, words
from study.execution import PROMPT_FILES
from study.methods import METHODS
from study.plan import Planner, make_plan
from study.settings import IMAGES, QUICK, Size


def test_table_1_spends_the_same_compute_on_every_method(plan, decode):
    assert list(plan.table_1) == [40_000, 120_000]
    for budget, methods in plan.table_1.items():
        assert list(methods) == list(METHODS) and len(methods) == 10
        for label, runs in methods.items():
            assert [run.seed for run in runs] == [0, 1, 2]
            for run in runs:
                each = compute_per_update(run.script, run.flags, decode)
                rounds = run.flags.get("rounds", 1)
                assert run.updates % rounds == 0 and budget - rounds * each < run.compute <= budget, label
                before = compute_before(run.script, run.flags, decode)
                assert run.compute == pytest.approx(before + run.updates * each)


def test_every_method_is_tuned_alike_and_nothing_is_chosen_by_what_judges(planner, plan, folder):
    tuning = planner.tuning()
    for label, tried in tuning.tried.items():
        rate = METHODS[label].flags["learning_rate"]
        assert {setting.rate for setting in tried} == {rate * factor for factor in (1 / 3, 1, 3)}
        assert len(tried) in (6, 7) and METHODS[label].untuned() in tried
        assert all(run.flags["learning_rate"] == setting.rate for setting, run in tried.items())
        assert len({setting.n for setting in tried}) == (1 if label == "standard fine-tuning" else 2)
        assert {run.seed for run in tried.values()} == {0} and max(run.compute for run in tried.values()) <= 40_000
    # What was chosen need not be trained again: the first run of the smaller budget is the one that was tried.
    smallest = {runs[0].key for runs in plan.table_1[40_000].values()}
    assert smallest <= {run.key for run in tuning.runs()}
    sets = {name: set((folder / file).read_text().splitlines()) for name, file in PROMPT_FILES.items()}
    assert len(sets["study"]) == 36 and len(sets["held_out"]) == len(sets["judged"]) == 9
    assert len(sets["study"] | sets["held_out"] | sets["judged"]) == 54
    for run in tuning.runs() + plan.first_runs():
        data = run.flags.get("prompts_file") or run.flags["train_data_dir"] / "metadata.jsonl"
        assert all(prompt not in data.read_text() for prompt in sets["held_out"] | sets["judged"])


def test_sft_and_fine_tuning_are_compared_at_equal_updates_and_at_equal_compute(plan):
    for rate in Size().learning_rates:
        sharpened, updates, compute = (runs[0] for (of, _), runs in plan.sft_against_fine_tuning.items() if of == rate)
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


def test_only_what_is_shown_over_time_is_validated_in_training(plan):
    validated = {run.key for run in plan.other_runs() if run.flags["validation_steps"]}
    rate = IMAGES["learning_rate"]
    shown = {runs[0].key for (of, _), runs in plan.sft_against_fine_tuning.items() if of == rate}
    assert validated == shown and len(shown) == 3
    validated = {run.key for run in plan.first_runs() if run.flags["validation_steps"]}
    assert validated == {runs[0].key for runs in plan.largest.values()}


@pytest.mark.parametrize("size", [Size(), QUICK], ids=["study", "rehearsal"])
def test_every_command_is_understood_and_every_run_has_a_folder_of_its_own(size, folder, decode):
    planner = Planner(size, folder, decode)
    tuning = planner.tuning()
    plan = make_plan(planner, {label: next(iter(tried)) for label, tried in tuning.tried.items()})
    runs = tuning.runs() + plan.first_runs() + plan.other_runs()
    assert len({run.key for run in runs}) == len({(run.key, str(run.flags), run.updates) for run in runs})
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
