"""`--reward_scaling spread` in whole runs: every script, resume, two ranks, and what it decides."""

import shutil

import pytest
import torch

from tests.support.runs import SCRIPTS, SPEED, metrics, same_files, without_speed

# Brightness, and a thousand times what no step of training changes: how red the image is.
REWARDS = """
def light(images, prompts):
    return images.mean((1, 2, 3))

def red(images, prompts):
    return 1000 * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))
"""
WEIGHTS = {"light": 2.0, "red": 1.0}
METHODS = [name for name in SCRIPTS if name != "DPO_DATASET"]


@pytest.fixture
def scaled(tmp_path, method):
    """Changes of a command line: few forwards, and a sum of two rewards whose scales differ."""
    (tmp_path / "mine.py").write_text(REWARDS)
    model = ",".join(f"{tmp_path}/mine.py:{name}:{weight:g}" for name, weight in WEIGHTS.items())
    steps = {"SFT": {"trajectory_nums": 1}, "RLHF": {"trajectory_nums": 1, "infer_steps": 2}}
    steps |= {"DDPO": {"infer_steps": 3, "trajectory_nums": 1}, "D3PO": {"infer_steps": 3}}
    quick = steps.get(method, {"infer_steps": 2})
    return {"reward_model": model, "reward_scaling": "spread", "num_noisy_latents": 3, **quick}


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("method", METHODS)
def test_every_script_selects_by_the_scaled_sum_and_logs_the_components_as_they_are(
    method, train, flags, scaled, tmp_path
):
    assert train(flags(**scaled)) == 0
    for line in metrics(tmp_path / "run"):
        scales = {name: line[f"reward/scale/{name}"] for name in WEIGHTS}
        assert scales["red"] > 100 * scales["light"] > 0
        raw = {name: line[f"reward/component/{name}"] for name in WEIGHTS}
        assert line["reward/mean"] == pytest.approx(
            sum(w * raw[name] / scales[name] for name, w in WEIGHTS.items()), rel=1e-4
        )


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("method", ["BEST_OF_N"])
def test_it_is_off_by_default(train, flags, scaled, tmp_path):
    assert train(flags(**{**scaled, "reward_scaling": None})) == 0
    for line in metrics(tmp_path / "run"):
        assert not any(name.startswith("reward/scale") for name in line)
        raw = {name: line[f"reward/component/{name}"] for name in WEIGHTS}
        assert line["reward/mean"] == pytest.approx(sum(w * raw[name] for name, w in WEIGHTS.items()), rel=1e-4)


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    ("method", "changes"), [("SFT", {}), ("RLHF", {"generation_reuse": 2}), ("DPO", {"rounds": 2})]
)
def test_resumed_run_scales_as_one_that_was_never_interrupted(method, changes, train, flags, scaled, tmp_path):
    options = {**scaled, **changes, "max_train_steps": 4, "checkpointing_steps": 3, "learning_rate": 1e-3}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(flags(**options, output_dir=whole)) == 0
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", resumed)
    assert train(flags(**options, output_dir=resumed, resume_from_checkpoint="latest")) == 0
    lines = [[*map(without_speed, metrics(run))] for run in (whole, resumed)]
    assert len(lines[0]) == 4 and lines[0] == lines[1]
    # What the last step would be without what the checkpoint knows: another scale.
    forgetful = tmp_path / "forgetful"
    shutil.copytree(whole / "checkpoint-3", forgetful / "checkpoint-3")
    shared = torch.load(forgetful / "checkpoint-3" / "shared.pt", weights_only=True)
    assert shared.pop("spread").keys() == WEIGHTS.keys()
    torch.save(shared, forgetful / "checkpoint-3" / "shared.pt")
    assert train(flags(**options, output_dir=forgetful, resume_from_checkpoint="latest")) == 0
    assert metrics(forgetful)[-1]["reward/scale/red"] != lines[0][-1]["reward/scale/red"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["BEST_OF_N"])
@pytest.mark.xdist_group("two processes")
def test_two_ranks_scale_by_the_spread_of_both(method, launch, train, flags, scaled, tmp_path):
    """Two processes equal one of twice the batch; a later step of theirs shows that they remember alike."""
    options = {**scaled, "samples_of": "base", "max_train_steps": 3, "checkpointing_steps": 2, "train_rows": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(flags(**options, train_batch_size=4, output_dir=one)) == 0
    result = launch(flags(**options, train_batch_size=2, output_dir=two), "torchrun")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "x 2 processes" in result.stdout
    for left, right in zip(metrics(one), metrics(two), strict=True):
        for name in left.keys() - SPEED:
            tight = name.startswith(("reward/scale", "reward/component"))
            assert left[name] == pytest.approx(right[name], rel=1e-5 if tight else 1e-2, abs=1e-6), name
    resumed = tmp_path / "resumed"
    shutil.copytree(two / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(two / "metrics.jsonl", resumed)
    options |= {"output_dir": resumed, "resume_from_checkpoint": "latest"}
    result = launch(flags(**options, train_batch_size=2), "torchrun")
    assert result.returncode == 0, result.stderr[-3000:]
    assert [*map(without_speed, metrics(two))] == [*map(without_speed, metrics(resumed))]
    assert same_files(two / "checkpoint-2", resumed / "checkpoint-2", ["shared.pt"]) == []


@pytest.mark.parametrize("method", ["SFT"])
def test_scaling_where_nothing_is_selected_is_refused(train, flags, scaled, capsys):
    assert train(flags(**{**scaled, "num_noisy_latents": 1})) == 2
    error = capsys.readouterr().err
    assert "--reward_scaling has no effect with --num_noisy_latents=1" in error and error.count("\n") == 1
