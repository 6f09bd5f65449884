"""What every baseline promises: its cost, its plan, exact resume, accumulation, curves, the result, failures."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from sharpening import model_source
from tests.baselines import literal
from tests.support.runs import ROOT, SPEED, metrics, plan_of, same_files, same_tensors, without_speed

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ADAPTER = "pytorch_lora_weights.safetensors"
STATE = (WEIGHTS, WEIGHTS.replace("unet/", "unet_ema/"), "optimizer.bin", "custom_checkpoint_0.pkl")
CURVES = SPEED | {
    "loss", "lr", "grad_norm", "reward/mean", "reward/best", "reward/worst", "reward/spread", "reward/tie_rate",
    "reward/failure_rate", "reward/component/shapes", "reward/component/jpeg_compressibility",
}  # fmt: skip
PREFERRED = {
    "preference/logits",
    "preference/kl",
    "preference/log_ratio_best",
    "preference/log_ratio_worst",
    "reward/margin",
}
PREFERENCE = {
    "DPO": PREFERRED | {"preference/accuracy"},
    "D3PO": PREFERRED | {"preference/steps_won", "preference/clamped"},
}
BASE = {"samples_of": "base"}
ONLINE = ("DDPO", "D3PO")  # nothing is drawn once for the whole run


@pytest.fixture(params=["DPO", "BEST_OF_N", "DDPO", "D3PO"])
def method(request):
    return request.param


def cases(of_method):
    """Parameters (method, changes) of a table method -> changes of the command line."""
    parameters = [(method, changes) for method, several in of_method.items() for changes in several]
    names = [f"{method}-{','.join(changes) or 'defaults'}" for method, changes in parameters]
    return pytest.mark.parametrize(("method", "changes"), parameters, ids=names)


# -------------------------------------------------------------------------------------------------------------- cost


@pytest.mark.usefixtures("no_result")
@cases(
    {
        "DPO": [
            {},
            {"num_noisy_latents": 4, "gradient_accumulation_steps": 2, "train_rows": 3},
            {"guidance_scale": 1, "sets": 2},
            {"rounds": 2, "use_lora": True},
        ],
        "BEST_OF_N": [
            {},
            {"guidance_scale": 1, "gradient_accumulation_steps": 2, "num_noisy_latents": 4},
            {**BASE, "sets": 2},
            {**BASE, "use_lora": True, "guidance_scale": 1},
        ],
        "DDPO": [{}, {"num_noisy_latents": 4, "trajectory_nums": 3, "gradient_accumulation_steps": 2}],
        "D3PO": [
            {},
            {"num_noisy_latents": 4, "train_rows": 7, "gradient_accumulation_steps": 2},
            {"guidance_scale": 1, "use_lora": True},
        ],
    }
)
def test_rows_are_those_documented(method, changes, script, train, flags, prompts, quick, seen):
    """Of the UNet and of the decoder, in a run that sees every set of every prompt."""
    changes = {"sets": 1, "rounds": 1, "infer_steps": 4, **changes}
    given = {name: value for name, value in changes.items() if (name, value) not in (("sets", 1), ("rounds", 1))}
    steps = 2 * changes["sets"] * changes["rounds"]
    command = flags(**{**prompts, **quick, **given}, max_train_steps=steps)
    assert train(command) == 0
    args = script.parse_args(command)
    counted = {purpose: literal.rows_of(seen, purpose) for purpose in ("generate", "reference", "train")}
    counted["decode"] = sum(map(len, seen.decodes))
    before = {} if method in ONLINE else script.rows_before(args, len(literal.CAPTIONS))
    per_step = script.rows_per_step(args)
    assert counted == {name: steps * per_step.get(name, 0) + before.get(name, 0) for name in counted}
    assert counted["train"] > 0 and counted["generate"] > 0 and counted["decode"] > 0


PLAN = {  # 8 prompts a step, n = 5; 5 steps to generate, of two rows each with guidance
    "DPO": {
        "pairs": "best and worst of n = 5 samples, 3 sets per prompt, 2 rounds",
        "drawn once": "3600 rows to generate, 360 decodes, in all",
        "forwards per step": "16 rows to reference, 16 rows to train, per process",
        "decodes per step": "0, per process",
    },
    "BEST_OF_N": {
        "samples": "best of n = 5, of base",
        "drawn once": "1800 rows to generate, 180 decodes, in all",
        "forwards per step": "8 rows to train, per process",
        "decodes per step": "0, per process",
    },
    "DDPO": {
        "paths": "n = 5 of 5 steps per prompt, m = 3 of them trained on",
        "forwards per step": "200 rows to generate, 120 rows to train, per process",
        "decodes per step": "40, per process",
    },
    "D3PO": {
        "paths": "best and worst of n = 5 of 5 steps per prompt, 4 trained on",
        "forwards per step": "400 rows to generate, 128 rows to reference, 128 rows to train, per process",
        "decodes per step": "40, per process",
    },
}
PLANNED = {"DPO": {"sets": 3, "rounds": 2}, "BEST_OF_N": {**BASE, "sets": 3}, "DDPO": {}, "D3PO": {}}


def test_dry_run_prints_the_plan_and_touches_nothing(method, train, flags, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a dry run loaded weights")

    monkeypatch.setattr(model_source.Source, "load", refuse)
    options = {**PLANNED[method], "gradient_accumulation_steps": 4, "num_noisy_latents": 5}
    assert train(flags(**options, dry_run=True)) == 0
    plan = plan_of(capsys.readouterr().out)
    assert {name: plan[name] for name in PLAN[method]} == PLAN[method]
    assert ("drawn once" in plan) == (method not in ONLINE)
    assert plan["rows per step"] == "8 = 2 per batch x 4 accumulated x 1 processes"
    assert plan["steps"] == "2, 2 per epoch, 1.00 epochs"
    assert ("reference" in plan["memory held"]) == (method != "DDPO")
    assert not (tmp_path / "run").exists()


def test_dry_run_with_an_adapter_counts_no_copy(method, train, flags, capsys):
    assert train(flags(**PLANNED[method], dry_run=True, use_lora=True)) == 0
    plan = plan_of(capsys.readouterr().out)
    assert "LoRA of rank 16: 0.0M train" in plan["model"] and "reference" not in plan["memory held"]


@pytest.mark.parametrize("method", ["BEST_OF_N"])
def test_own_samples_are_in_the_plan_of_every_step(train, flags, capsys):
    assert train(flags(num_noisy_latents=5, gradient_accumulation_steps=4, dry_run=True)) == 0
    plan = plan_of(capsys.readouterr().out)
    assert plan["samples"] == "best of n = 5, of own" and "drawn once" not in plan
    assert plan["forwards per step"] == "400 rows to generate, 8 rows to train, per process"
    assert plan["decodes per step"] == "40, per process" and "reference" not in plan["memory held"]


def run_alone(code):
    """Run some lines of Python in a process of their own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)


def test_help_lists_every_flag_without_importing_torch(script):
    result = run_alone(
        f"import sys, {script.__name__} as script\n"
        "try:\n    script.cli(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    assert result.returncode == 0, result.stderr
    for flags in script.FLAGS.values():
        for flag in flags:
            assert f"--{flag.name}" in result.stdout


@pytest.mark.parametrize("method", ["DPO"])
def test_dry_runs_do_not_wait_for_the_models_code_to_be_imported(flags):
    """All of them in one process, whose imports take longest."""
    result = run_alone(
        "import sys\nfrom baselines import best_of_n, d3po, ddpo, diffusion_dpo\n"
        f"for script in (diffusion_dpo, best_of_n, ddpo, d3po):\n    assert script.cli({flags(dry_run=True)!r}) == 0\n"
        "assert not {'diffusers.models', 'peft', 'bitsandbytes'} & set(sys.modules)"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("memory held") == 4


# ------------------------------------------------------------------------------------------------------------ resume

OWN = {"DPO": [{}], "BEST_OF_N": [{}, BASE], "DDPO": [{}], "D3PO": [{}]}


@pytest.mark.usefixtures("no_result")
@cases(OWN)
def test_three_plus_three_steps_equal_six_bit_for_bit(changes, train, flags, quick, tmp_path):
    options = {**quick, "max_train_steps": 6, "checkpointing_steps": 3, "use_ema": True, "lr_scheduler": "cosine"}
    options |= {"lr_warmup_steps": 2, "gradient_accumulation_steps": 2, "seed": None, "learning_rate": 1e-3, **changes}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(flags(**options, output_dir=whole)) == 0
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", resumed)
    assert train(flags(**options, output_dir=resumed, resume_from_checkpoint="latest")) == 0
    assert same_files(whole / "checkpoint-6", resumed / "checkpoint-6", STATE) == []
    assert [line["step"] for line in metrics(resumed)] == [1, 2, 3, 4, 5, 6]
    assert [*map(without_speed, metrics(whole))] == [*map(without_speed, metrics(resumed))]
    # The seed was drawn, not given: the resumed run took it from the checkpoint.
    first, second = (json.loads((run / "checkpoint-6" / "state.json").read_text()) for run in (whole, resumed))
    assert first["args"]["seed"] == second["args"]["seed"] is not None


@pytest.mark.usefixtures("no_result")
@cases(OWN)
def test_with_an_adapter_resume_is_exact_too(changes, train, flags, quick, tmp_path):
    options = {**quick, "max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True, "use_lora": True, **changes}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(flags(**options, output_dir=whole)) == 0
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    assert train(flags(**options, output_dir=resumed, resume_from_checkpoint="latest")) == 0
    for folder in ("lora", "lora_ema"):
        assert same_tensors(whole / "checkpoint-4" / folder / ADAPTER, resumed / "checkpoint-4" / folder / ADAPTER)
    assert same_files(whole / "checkpoint-4", resumed / "checkpoint-4", ["optimizer.bin"]) == []


BOUND = {
    "DPO": [{"beta_dpo": 10.0}, {"sets": 2}, {"guidance_scale": 2.0}, {"noise_offset": 0.1}],
    "BEST_OF_N": [BASE, {**BASE, "sets": 2}, {"num_noisy_latents": 3}, {"snr_gamma": 5.0}],
    "DDPO": [{"trajectory_nums": 2}, {"num_noisy_latents": 3}],
    "D3PO": [{"beta": 0.2}, {"ratio_clip": 0.2}, {"num_noisy_latents": 3}, {"guidance_scale": 2.0}],
}


@pytest.mark.usefixtures("no_result")
@cases(BOUND)
def test_any_flag_that_changes_the_computation_is_pointed_out(
    changes, train, flags, trained_once, quick, tmp_path, caplog
):
    checkpoint = trained_once(**quick, max_train_steps=1, checkpointing_steps=1) / "checkpoint-1"
    shutil.copytree(checkpoint, tmp_path / "run" / checkpoint.name)
    harmless = {"score_batch_size": 3, "generation_batch_size": 3, "train_rows": 4, "max_train_steps": 2}
    assert train(flags(**{**quick, **harmless, **changes}, resume_from_checkpoint="latest")) == 0
    warnings = [record.message for record in caplog.records if "never interrupted" in record.message]
    assert len(warnings) == len(changes)
    assert all(any(f"--{name} was" in warning for warning in warnings) for name in changes)


@pytest.mark.usefixtures("no_result")
def test_checkpoint_of_another_script_is_refused(train, flags, trained_once, quick, tmp_path, capsys):
    checkpoint = trained_once(**quick, max_train_steps=1, checkpointing_steps=1) / "checkpoint-1"
    copy = tmp_path / "run" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps({**state, "method": "SFT Diffusion-Sharpening"}))
    assert train(flags(**quick, max_train_steps=2, resume_from_checkpoint="latest")) == 2
    error = capsys.readouterr().err
    assert "was written by SFT Diffusion-Sharpening, but this script is" in error and state["method"] in error


# ------------------------------------------------------------------------------------------------------ the gradient


# A reward is of an image that the VAE decodes in float32: of selection nothing of its rounding is left, of advantages
# all of it.
ROUNDING = {"DPO": 1e-9, "BEST_OF_N": 1e-9, "DDPO": 1e-3, "D3PO": 1e-9}
NOISING = {"proportion_empty_prompts": 0.3, "noise_offset": 0.1}


@pytest.mark.usefixtures("no_result", "in_double")
@cases(
    {
        "DPO": [NOISING, {"use_lora": True}],
        "BEST_OF_N": [NOISING, {**NOISING, **BASE}],
        "DDPO": [{}],
        "D3PO": [{}, {"use_lora": True}],
    }
)
def test_accumulated_batches_equal_a_bigger_batch(method, changes, train, flags, quick, seen, tmp_path):
    """The gradient of the second step, where DPO's model has left its reference."""
    options = {**quick, "infer_steps": 3, "max_train_steps": 2, "max_grad_norm": 1e9, "learning_rate": 1e-4, **changes}
    whole, parts = tmp_path / "4x1", tmp_path / "1x4"
    assert train(flags(**options, train_batch_size=4, output_dir=whole)) == 0
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "score_batch_size": 1}
    split["train_rows"] = 4 if method == "D3PO" else 2
    assert train(flags(**options, **split, output_dir=parts)) == 0
    for one, other in zip(seen.updates[:2], seen.updates[2:], strict=True):
        assert (one.gradient - other.gradient).norm() < ROUNDING[method] * one.gradient.norm()
    left, right = without_speed(metrics(whole)[1]), without_speed(metrics(parts)[1])
    assert left.keys() == right.keys()
    for name in left:
        assert left[name] == pytest.approx(right[name], rel=max(1e-5, ROUNDING[method]), abs=1e-6), name


@pytest.fixture
def second_gradient(method, train, flags, quick, seen, tmp_path):
    """The gradient of the second step of a run in which the first one moves the model."""

    def of(**changes):
        options = {**quick, "infer_steps": 3, "max_train_steps": 2, "max_grad_norm": 1e9}
        # D3PO has no gradient where a step has gone too far.
        options["learning_rate"] = 1e-4 if method == "D3PO" else 1e-3
        run = tmp_path / str(len(seen.updates))
        assert train(flags(**{**options, **changes}, output_dir=run)) == 0
        return seen.updates[-1].gradient

    return of


NOISED = [
    {"snr_gamma": 5.0}, {"noise_offset": 0.5}, {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 50},
    {"proportion_empty_prompts": 0.9}, {"guidance_scale": 1.0}, {"num_noisy_latents": 3}, {"infer_steps": 4},
]  # fmt: skip


@pytest.mark.usefixtures("no_result")
@cases(
    {
        "DPO": [*NOISED, {"beta_dpo": 10.0}, {"rounds": 2}],
        "BEST_OF_N": [*NOISED, BASE],
        "DDPO": [{"num_noisy_latents": 3}, {"trajectory_nums": 2}, {"infer_steps": 4}],
        "D3PO": [{"num_noisy_latents": 3}, {"infer_steps": 4}, {"beta": 10.0}, {"guidance_scale": 1.0}],
    }
)
def test_flag_changes_the_gradient(changes, second_gradient):
    plain, changed = second_gradient(), second_gradient(**changes)
    assert (plain - changed).norm() > 1e-3 * plain.norm()


@pytest.mark.usefixtures("no_result", "in_double")
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "generation_batch_size": 3},
        {"score_batch_size": 1, "decode_batch_size": 1, "train_rows": 3, "dataloader_num_workers": 1},
    ],
    ids=["checkpointing", "slices"],
)
def test_flag_changes_cost_and_not_the_gradient(changes, method, second_gradient):
    if method == "D3PO" and "train_rows" in changes:
        changes = {**changes, "train_rows": 5}  # a guided pair has 4
    plain, changed = second_gradient(), second_gradient(**changes)
    assert plain.norm() > 0
    assert (plain - changed).norm() < ROUNDING[method] * plain.norm()


@pytest.mark.parametrize("method", ["DPO", "BEST_OF_N"])
@pytest.mark.usefixtures("no_result")
def test_dropped_prompts_train_without_and_are_drawn_and_judged_with_their_caption(
    train, flags, quick, seen, tmp_path
):
    body = "assert all('background' in prompt for prompt in prompts)\n    return images.mean((1, 2, 3))"
    options = {**quick, "reward_model": literal.write_reward(tmp_path, body), "guidance_scale": 1}
    assert train(flags(**options, proportion_empty_prompts=1.0)) == 0
    of = {purpose: literal.together(literal.of(seen, purpose))[2] for purpose in ("generate", "train")}
    size = {purpose: condition.embeds.abs().sum((1, 2)) for purpose, condition in of.items()}
    assert size["generate"].min() > 0 and size["train"].max() == 0  # SDXL's unconditional embedding is zero


# ---------------------------------------------------------------------------------------------- what a run leaves


def test_every_promised_curve_and_the_best_and_worst_samples(method, train, flags, quick, tmp_path):
    options = {**quick, "reward_model": "shapes,jpeg_compressibility:0.1", "branch_image_steps": 2}
    options |= {"validation_prompt": "a red circle on a white background", "validation_steps": 2}
    options |= {"num_validation_images": 2}
    assert train(flags(**options)) == 0
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2
    for line in lines:
        validated = {"validation/reward", "validation/reward_standard_error"} if line["step"] == 2 else set()
        assert CURVES | PREFERENCE.get(method, set()) | validated <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
        assert line["reward/worst"] <= line["reward/mean"] <= line["reward/best"]
        total = line["reward/component/shapes"] + 0.1 * line["reward/component/jpeg_compressibility"]
        assert line["reward/mean"] == pytest.approx(total, rel=1e-5)
        assert 0 < line["generation_time_share"] < 1
    shown = {"branches_best_000002.png", "branches_worst_000002.png"}
    assert shown <= {path.name for path in (tmp_path / "run" / "images").iterdir()}
    assert (tmp_path / "run" / "reward_curve.png").stat().st_size > 10_000


def test_result_is_a_pipeline_that_stock_diffusers_loads_and_draws_with(method, train, flags, world, quick, tmp_path):
    assert train(flags(**quick, learning_rate=1e-3)) == 0
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle on a white background", num_inference_steps=2).images[0]
    assert image.size == (32, 32)
    base = UNet2DConditionModel.from_pretrained(world.model, subfolder="unet")
    changed = [not torch.equal(*pair) for pair in zip(pipeline.unet.parameters(), base.parameters(), strict=True)]
    assert all(changed)
    card = (tmp_path / "run" / "README.md").read_text()
    said = {"DPO": "Diffusion-DPO", "BEST_OF_N": "best-of-n fine-tuning", "DDPO": "DDPO", "D3PO": "D3PO"}[method]
    assert f"with {said} ([arXiv" in card and "reward `shapes`" in card and "| `learning_rate` | `0.001` |" in card


def test_with_use_lora_it_is_an_adapter_that_stock_diffusers_applies(train, flags, world, quick, tmp_path):
    assert train(flags(**quick, use_lora=True, lora_rank=4, lora_alpha=8, learning_rate=1e-2)) == 0
    assert not (tmp_path / "run" / "model_index.json").exists()
    pipeline = StableDiffusionXLPipeline.from_pretrained(world.model)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        options = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        return pipeline("a red circle on a white background", **options).images

    before = draw()
    pipeline.load_lora_weights(tmp_path / "run")
    assert (draw() - before).abs().max() > 1e-3
    assert "pipe.load_lora_weights" in (tmp_path / "run" / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------- failures


def test_reward_that_fails_stops_with_one_sentence_after_a_checkpoint(train, flags, quick, tmp_path, capsys):
    switch = tmp_path / "broken"
    body = (
        f"import pathlib\n    if pathlib.Path({str(switch)!r}).exists():\n        raise OSError('it fell over')\n"
        "    return images.mean((1, 2, 3))"
    )
    options = {**quick, "reward_model": literal.write_reward(tmp_path, body), "checkpointing_steps": 1}
    switch.touch()
    assert train(flags(**options)) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "step 1" in error and "mine" in error and "it fell over" in error
    assert (tmp_path / "run" / "checkpoint-0" / "state.json").exists()
    switch.unlink()
    assert train(flags(**options, resume_from_checkpoint="latest")) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.usefixtures("no_result")
@cases(OWN)
def test_skipped_failures_leave_the_scored_prompts_to_learn_from(changes, train, flags, quick, prompts, tmp_path):
    """Two prompts' images never have a score, those of the others always do."""
    body = "return torch.where(torch.tensor(['blue' in p for p in prompts]), torch.nan, images.mean((1, 2, 3)))"
    options = {**quick, **prompts, **changes, "reward_model": literal.write_reward(tmp_path, body)}
    options |= {"train_batch_size": 4, "reward_failure": "skip", "adam_weight_decay": 0}
    assert train(flags(**options)) == 0
    for line in metrics(tmp_path / "run"):
        assert line["reward/failure_rate"] == 0.5
        assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0
    assert train(flags(**{**options, "reward_failure": "raise"}, output_dir=tmp_path / "raise")) == 1


@pytest.mark.usefixtures("no_result")
@cases(OWN)
def test_prompts_without_two_scores_have_no_gradient(changes, method, train, flags, quick, prompts, tmp_path, seen):
    """Without any score, or with one of two, a prompt says nothing: the gradient is that of the others, by four."""
    every = "return images.mean((1, 2, 3))"
    some = (
        "scores, seen = images.mean((1, 2, 3)), {}\n    for row, prompt in enumerate(prompts):\n"
        "        first = seen.setdefault(prompt, row) == row\n"
        "        if 'triangle' in prompt or 'square' in prompt and first:\n            scores[row] = torch.nan\n"
        "    return scores"
    )
    flat = every + " * torch.tensor([('triangle' not in p and 'square' not in p) for p in prompts])"
    options = {**quick, **prompts, **changes, "train_batch_size": 4, "max_train_steps": 1, "max_grad_norm": 1e9}
    for name, body in (("some", some), ("flat", flat)):
        (tmp_path / name).mkdir()
        reward = literal.write_reward(tmp_path / name, body)
        run = tmp_path / name / "run"
        assert train(flags(**options, reward_model=reward, reward_failure="skip", output_dir=run)) == 0
    unscored, tied = (update.gradient for update in seen.updates)
    assert unscored.norm() > 0 and torch.equal(unscored, tied)


def test_flat_reward_teaches_nothing(train, flags, world, quick, tmp_path):
    options = {**quick, "reward_model": literal.write_reward(tmp_path, "return torch.ones(len(prompts))")}
    assert train(flags(**options, adam_weight_decay=0)) == 0
    for line in metrics(tmp_path / "run"):
        assert line["grad_norm"] == 0 and line["reward/tie_rate"] == 1
        assert line.get("loss", 0) == 0
    base = UNet2DConditionModel.from_pretrained(world.model, subfolder="unet")
    trained = UNet2DConditionModel.from_pretrained(tmp_path / "run", subfolder="unet")
    assert all(map(torch.equal, base.parameters(), trained.parameters()))


def test_diverged_generation_stops_with_one_sentence(train, flags, world, quick, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias.fill_(float("nan"))
    unet.save_pretrained(model / "unet")
    assert train(flags(**quick, pretrained_model_name_or_path=model)) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "step 1: the generated latents are not finite" in error and "--learning_rate" in error


# --------------------------------------------------------------------------------------------------- real processes


@pytest.mark.slow
def test_real_launch_leaves_a_pipeline_and_refuses_in_one_sentence(launch, flags, quick, tmp_path):
    result = launch(flags(**quick), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "saved the pipeline" in result.stdout
    assert len(metrics(tmp_path / "run")) == 2
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "run").unet is not None
    refused = launch(flags(resolution=100), cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --resolution is 100") and len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["DPO"])
@pytest.mark.xdist_group("two processes")
def test_two_processes_equal_one_of_twice_the_batch(launch, train, flags, prompts, quick, tmp_path):
    """In rounds and with an adapter, whose reference is swapped in below the wrapper that exchanges gradients."""
    options = {**quick, **prompts, "rounds": 2, "max_train_steps": 4, "use_lora": True, "use_ema": True}
    options |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "train_rows": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(flags(**options, train_batch_size=4, output_dir=one)) == 0
    result = launch(flags(**options, train_batch_size=2, output_dir=two), "torchrun")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "x 2 processes" in result.stdout
    for left, right in zip(metrics(one), metrics(two), strict=True):
        for name in left.keys() - SPEED:
            assert left[name] == pytest.approx(right[name], rel=2e-2, abs=2e-4), name
    left, right = (load_file(run / ADAPTER) for run in (one, two))
    assert left.keys() == right.keys()
    difference = torch.cat([(left[name] - right[name]).flatten() for name in left]).abs()
    # Adam's first steps are nearly signs: where a gradient is all rounding, a weight may go either way.
    assert (difference > 1e-4).float().mean() <= 2e-2
