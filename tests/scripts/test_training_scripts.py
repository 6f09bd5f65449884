"""Both training scripts whole, in this process: exact resume, accumulation, failing rewards, what a run leaves."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sharpening import model_source, sdxl
from sharpening.trajectory import Schedule, generate
from tests.support.runs import ROOT, SCRIPTS, metrics, same_files

STATE = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet_ema/diffusion_pytorch_model.safetensors",
    "optimizer.bin",
    "custom_checkpoint_0.pkl",
)
CURVES = {
    "loss", "lr", "grad_norm", "reward/mean", "reward/best", "reward/worst", "reward/spread", "reward/tie_rate",
    "samples_per_second", "peak_memory_gib",
}  # fmt: skip
CURVES_OF = {
    "SFT": CURVES,
    "RLHF": CURVES
    | {"preference/accuracy", "preference/logits", "preference/kl", "preference/log_ratio_best"}
    | {"preference/log_ratio_worst", "reward/margin", "generation_time_share"},
}


SPEED = {"samples_per_second", "peak_memory_gib", "generation_time_share"}


@pytest.fixture(params=["SFT", "RLHF"])
def method(request):
    return request.param


only_sft = pytest.mark.parametrize("method", ["SFT"], indirect=False)


# How far rounding carries, relative to the norm: RLHF's gradient is the difference of two that nearly cancel, and its
# latents come out of 25 steps whose rounding depends on the batch.
ROUNDING = {"SFT": 1e-5, "RLHF": 4e-3}


def values(line):
    """A line of metrics without what depends on the machine's speed."""
    return {name: value for name, value in line.items() if name not in SPEED}


def test_three_plus_three_steps_equal_six_bit_for_bit(train, flags, tmp_path):
    options = {"max_train_steps": 6, "checkpointing_steps": 3, "use_ema": True, "lr_scheduler": "cosine"}
    options |= {"lr_warmup_steps": 2, "gradient_accumulation_steps": 2, "seed": None, "dataloader_num_workers": 0}
    options["trajectory_nums"] = 2
    assert train(flags(**options, output_dir=tmp_path / "whole")) == 0
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", resumed)
    (resumed / "checkpoint-5").mkdir()  # what a run killed by an older version might have left
    assert train(flags(**options, output_dir=resumed, resume_from_checkpoint="latest")) == 0
    assert same_files(tmp_path / "whole" / "checkpoint-6", resumed / "checkpoint-6", STATE) == []
    assert same_files(tmp_path / "whole", resumed, ["unet/diffusion_pytorch_model.safetensors"]) == []
    whole, again = metrics(tmp_path / "whole"), metrics(resumed)
    assert [line["step"] for line in again] == [1, 2, 3, 4, 5, 6]
    assert list(map(values, whole)) == list(map(values, again))
    assert whole[0]["lr"] < whole[1]["lr"] > whole[-1]["lr"]
    # The seed was drawn, not given: the resumed run took it from the checkpoint.
    first, second = (
        json.loads((run / "checkpoint-6" / "state.json").read_text()) for run in (tmp_path / "whole", resumed)
    )
    assert first["args"]["seed"] == second["args"]["seed"] is not None


@pytest.mark.usefixtures("no_result")
def test_incomplete_checkpoints_are_passed_over_with_a_warning(train, flags, tmp_path, caplog):
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    assert train(flags(checkpointing_steps=2, resume_from_checkpoint="latest")) == 0
    assert "checkpoint-7 is incomplete" in caplog.text
    assert (tmp_path / "run" / "checkpoint-2" / "state.json").exists()


@pytest.mark.usefixtures("no_result")
def test_resuming_with_other_settings_is_pointed_out(train, flags, caplog):
    assert train(flags(checkpointing_steps=2)) == 0
    assert train(flags(resume_from_checkpoint="latest", max_train_steps=3, train_batch_size=4)) == 0
    warnings = [record.message for record in caplog.records if "never interrupted" in record.message]
    assert len(warnings) == 1 and "--train_batch_size was 2 and is now 4" in warnings[0]


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    "changes",
    [
        {"branch_target": "consistent"}, {"snr_gamma": 5.0}, {"proportion_empty_prompts": 0.5}, {"noise_offset": 0.1},
        {"branch_guidance_scale": 2.0}, {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 2.0},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_any_flag_that_changes_the_computation_is_pointed_out(changes, train, flags, trained_once, tmp_path, caplog):
    common = {"max_train_steps": 1, "infer_steps": 3}
    checkpoint = trained_once(**common, checkpointing_steps=1) / "checkpoint-1"
    shutil.copytree(checkpoint, tmp_path / "run" / checkpoint.name)
    harmless = {"score_batch_size": 3, "checkpointing_steps": 7, "max_train_steps": 2, "dataloader_num_workers": 0}
    assert train(flags(**{**common, **harmless, **changes}, resume_from_checkpoint="latest")) == 0
    warnings = [record.message for record in caplog.records if "never interrupted" in record.message]
    assert len(warnings) == len(changes)
    assert all(any(f"--{name} was" in warning for warning in warnings) for name in changes)


@pytest.mark.usefixtures("no_result")
def test_only_the_newest_checkpoints_are_kept(train, flags, tmp_path):
    options = {"max_train_steps": 5, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "trajectory_nums": 1}
    assert train(flags(**options)) == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]


@pytest.fixture
def gradients(monkeypatch):
    """The gradient of every optimizer step, before clipping."""
    from accelerate import Accelerator

    seen = []
    clip = Accelerator.clip_grad_norm_

    def record(self, parameters, *args, **kwargs):
        parameters = list(parameters)
        seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).clone())
        return clip(self, parameters, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", record)
    return seen


@pytest.fixture(scope="module")
def known_gradients():
    return {}


@pytest.fixture
def first_gradient(method, train, flags, tmp_path, gradients, known_gradients):
    """The gradient of the first step under some flags, from one run for all tests that ask for it."""

    def of(**changes):
        key = (method, repr(changes))
        if key not in known_gradients:
            gradients.clear()
            assert train(flags(**changes, max_train_steps=1, output_dir=tmp_path / str(len(known_gradients)))) == 0
            known_gradients[key] = gradients[0]
        return known_gradients[key]

    return of


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    "extra", [{}, pytest.param({"preset": "released", "gradient_checkpointing": True}, marks=pytest.mark.slow)]
)
def test_eight_accumulated_batches_of_one_equal_one_batch_of_eight(method, train, flags, tmp_path, gradients, extra):
    common = {"max_train_steps": 1, "proportion_empty_prompts": 0.3, "noise_offset": 0.1, **extra}
    whole, parts = tmp_path / "8x1", tmp_path / "1x8"
    assert train(flags(**common, train_batch_size=8, output_dir=whole)) == 0
    assert train(flags(**common, train_batch_size=1, gradient_accumulation_steps=8, output_dir=parts)) == 0
    assert (gradients[0] - gradients[1]).norm() < ROUNDING[method] * gradients[0].norm()
    left, right = values(metrics(whole)[0]), values(metrics(parts)[0])
    assert left.keys() == right.keys()
    for name in left:
        assert left[name] == pytest.approx(right[name], rel=10 * ROUNDING[method], abs=ROUNDING[method] / 10), name


@pytest.mark.usefixtures("no_result")
@only_sft
def test_one_branch_of_one_step_trains_as_plain_diffusers_does(method, train, flags, world, gradients):
    """The script's first gradient at n = m = 1 against a training step written with diffusers alone."""
    assert train(flags(num_noisy_latents=1, trajectory_nums=1, max_train_steps=1, train_batch_size=4, seed=3)) == 0
    import datasets
    import numpy as np

    from sharpening.draws import DrawSampler, draw_generator

    pipeline = StableDiffusionXLPipeline.from_pretrained(world.model)
    images = datasets.load_dataset("imagefolder", data_dir=str(world.shapes), split="train")
    (batch,) = DrawSampler(len(images), 4, 0, 1, 1, 3, 0, 1)
    rows = [images[row] for row, _ in batch]
    pixels = torch.stack([torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) / 127.5 - 1 for row in rows])
    latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    embeds, _, pooled, _ = pipeline.encode_prompt([row["text"] for row in rows], do_classifier_free_guidance=False)
    noise = torch.cat([torch.randn(1, *latents.shape[1:], generator=draw_generator(3, g, "noise")) for _, g in batch])
    uniform = torch.full((1000,), 1 / 1000)
    t = torch.cat([torch.multinomial(uniform, 1, generator=draw_generator(3, g, "timestep")) for _, g in batch])
    noisy = pipeline.scheduler.add_noise(latents, noise, t)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[32, 32, 0, 0, 32, 32]] * 4)}
    output = pipeline.unet(noisy, t, embeds, added_cond_kwargs=added).sample
    pipeline.unet.zero_grad()
    torch.nn.functional.mse_loss(output, noise).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in pipeline.unet.parameters()])
    assert (gradients[0] - expected).norm() < 1e-4 * expected.norm()


FAILURES = {
    "raises": ("raise OSError('the model fell over')", "OSError"),
    "nan": ("return torch.full((len(prompts),), float('nan'))", "nan"),
    "wrong shape": ("return torch.zeros(len(prompts), 2)", "shape"),
    "no tensor": ("return 'good'", "str"),
}


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("kind", FAILURES)
def test_failing_reward_stops_with_its_name_step_and_prompts_after_a_checkpoint(kind, train, flags, tmp_path, capsys):
    body, said = FAILURES[kind]
    switch = tmp_path / "broken"
    (tmp_path / "mine.py").write_text(
        "import pathlib\nimport torch\n\n\ndef picky(images, prompts):\n"
        f"    if pathlib.Path({str(switch)!r}).exists():\n        {body}\n    return images.mean((1, 2, 3))\n"
    )
    options = {"reward_model": f"{tmp_path}/mine.py:picky", "max_train_steps": 2, "checkpointing_steps": 1}
    options["trajectory_nums"] = 1
    switch.touch()
    assert train(flags(**options)) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "step 1" in error and "picky" in error and said in error and "background" in error
    assert (tmp_path / "run" / "checkpoint-0" / "state.json").exists()
    switch.unlink()
    assert train(flags(**options, resume_from_checkpoint="latest")) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


def test_gradient_that_is_not_finite_never_reaches_the_weights(train, flags, tmp_path, capsys, monkeypatch):
    from accelerate import Accelerator

    clip, norms = Accelerator.clip_grad_norm_, []

    def broken(self, *args, **kwargs):
        norms.append(clip(self, *args, **kwargs))
        return norms[-1] if len(norms) < 2 else torch.tensor(float("nan"))

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", broken)
    assert train(flags(max_train_steps=3, checkpointing_steps=1, infer_steps=5)) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "step 2: the gradient is not finite; lower --learning_rate" in error
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    saved = load_file(tmp_path / "run" / "checkpoint-1" / STATE[0])
    assert all(value.isfinite().all() for value in saved.values())


def test_every_promised_curve_is_in_metrics_and_tensorboard(method, train, flags, tmp_path):
    reward = "shapes,jpeg_compressibility:0.1"
    options = {"validation_prompt": "a red circle on a white background", "validation_steps": 2}
    assert train(flags(reward_model=reward, report_to="tensorboard", train_batch_size=12, **options)) == 0
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2
    names = CURVES_OF[method] | {"reward/component/shapes", "reward/component/jpeg_compressibility"}
    quarters = {f"reward/timesteps_q{index}" for index in (1, 2, 3, 4)}
    assert names <= lines[0].keys() & lines[1].keys()
    assert quarters & lines[0].keys()
    assert {"validation/reward", "validation/reward_standard_error"} <= lines[1].keys()
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
        assert line["reward/worst"] <= line["reward/mean"] <= line["reward/best"]
        total = line["reward/component/shapes"] + 0.1 * line["reward/component/jpeg_compressibility"]
        assert line["reward/mean"] == pytest.approx(total, abs=0.05)  # steps against prompts: inactive steps differ
    (events,) = (tmp_path / "run" / "logs").glob("*/events*")
    accumulator = EventAccumulator(str(events.parent), size_guidance={"images": 0})
    accumulator.Reload()
    assert names <= set(accumulator.Tags()["scalars"])
    assert "validation/images" in accumulator.Tags()["images"]
    logged = {event.step: event.value for event in accumulator.Scalars("reward/best")}
    assert logged == {line["step"]: pytest.approx(line["reward/best"]) for line in lines}
    assert (tmp_path / "run" / "reward_curve.png").stat().st_size > 10_000


@pytest.mark.usefixtures("no_result")
def test_best_and_worst_branches_are_shown(train, flags, tmp_path):
    assert train(flags(branch_image_steps=2, report_to="tensorboard")) == 0
    shown = sorted(path.name for path in (tmp_path / "run" / "images").iterdir())
    assert shown == ["branches_best_000002.png", "branches_worst_000002.png"]


def test_validation_leaves_the_training_weights_alone(train, flags, tmp_path):
    """With EMA, validation by steps and by epochs at once; the run is the same without any validation."""
    prompt = {"validation_prompt": "a red circle on a white background", "num_validation_images": 2}
    options = {"use_ema": True, "max_train_steps": 5, "checkpointing_steps": 5}
    options |= {"train_batch_size": 4, "infer_steps": 5, "trajectory_nums": 1}
    assert train(flags(**options, output_dir=tmp_path / "without")) == 0
    with_validation = {**options, **prompt, "validation_steps": 2, "validation_epochs": 1}  # 3 steps an epoch
    assert train(flags(**with_validation, output_dir=tmp_path / "with")) == 0
    assert same_files(tmp_path / "without" / "checkpoint-5", tmp_path / "with" / "checkpoint-5", STATE) == []
    validated = [line["step"] for line in metrics(tmp_path / "with") if "validation/reward" in line]
    assert validated == [2, 3, 4]
    weights = load_file(tmp_path / "with" / "checkpoint-5" / STATE[0])
    average = load_file(tmp_path / "with" / "checkpoint-5" / STATE[1])
    saved = load_file(tmp_path / "with" / STATE[0])
    assert all(torch.equal(saved[name], average[name]) for name in saved)
    assert any(not torch.equal(saved[name], weights[name]) for name in saved)


def test_trained_pipeline_loads_in_stock_diffusers_and_draws(train, flags, world, tmp_path):
    assert train(flags(learning_rate=1e-3)) == 0
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red circle on a white background", num_inference_steps=2).images[0]
    assert image.size == (32, 32)
    base = UNet2DConditionModel.from_pretrained(world.model, subfolder="unet")
    changed = [
        not torch.equal(new, old) for new, old in zip(pipeline.unet.parameters(), base.parameters(), strict=True)
    ]
    assert all(changed)
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers") and "| `learning_rate` | `0.001` |" in card


@pytest.mark.parametrize("prediction_type", [None, "v_prediction"])
def test_saved_scheduler_says_what_the_model_predicts(prediction_type, train, flags, tmp_path):
    assert train(flags(prediction_type=prediction_type, max_train_steps=1)) == 0
    scheduler = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run").scheduler
    assert scheduler.config.prediction_type == (prediction_type or "epsilon")


def test_failed_push_leaves_the_pipeline_complete(train, flags, tmp_path, capsys):
    assert train(flags(push_to_hub=True, hub_token="hf_PLANTED")) == 2
    error = capsys.readouterr().err
    assert "error: --push_to_hub failed" in error and "hf_PLANTED" not in error
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "run").unet is not None


@pytest.mark.usefixtures("no_result")
def test_dropped_prompts_train_without_and_are_judged_with_their_caption(train, flags, tmp_path, monkeypatch):
    asked, seen = [], []
    (tmp_path / "mine.py").write_text("def listen(images, prompts):\n    return images.mean((1, 2, 3))\n")
    from sharpening.rewards.calling import Reward

    begin, predict = Reward.begin, sdxl.predict_output

    def record_begin(self, images, prompts):
        asked.extend(prompts)
        return begin(self, images, prompts)

    def record_predict(unet, x, t, condition):
        seen.append(condition.embeds.abs().sum((1, 2)))
        return predict(unet, x, t, condition)

    def record_generation(predict, schedule, x, guide=None):
        """What is generated (RLHF) is for the prompt: only the training on it drops the prompt."""
        predict(x, torch.zeros(len(x), dtype=torch.int64))
        with_prompt, without = seen.pop().split(len(x))
        assert with_prompt.min() > 0 and without.max() == 0  # the latter for guidance
        return x

    monkeypatch.setattr("sharpening.trajectory.generate", record_generation)
    monkeypatch.setattr(Reward, "begin", record_begin)
    monkeypatch.setattr(sdxl, "predict_output", record_predict)
    options = {"reward_model": f"{tmp_path}/mine.py:listen", "max_train_steps": 1}
    assert train(flags(**options, proportion_empty_prompts=1.0)) == 0
    assert torch.cat(seen).abs().max() == 0  # SDXL's unconditional embedding is zero
    assert all("background" in prompt for prompt in asked)


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    "changes",
    [
        {"snr_gamma": 5.0},
        {"noise_offset": 0.5},
        {"prediction_type": "v_prediction"},
        {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 50},
        {"branch_target": "consistent"},
        {"branch_guidance_scale": 4.0},
        {"preset": "released"},
        {"proportion_empty_prompts": 0.9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_flag_changes_the_gradient(changes, first_gradient):
    plain, changed = first_gradient(train_batch_size=6), first_gradient(train_batch_size=6, **changes)
    assert (plain - changed).norm() > 1e-3 * plain.norm()


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"score_batch_size": 1, "decode_batch_size": 1},
        {"score_batch_size": 5, "decode_batch_size": 3},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_flag_changes_cost_and_not_the_gradient(changes, method, first_gradient):
    plain, changed = first_gradient(), first_gradient(**changes)
    assert (plain - changed).norm() < 10 * ROUNDING[method] * plain.norm()


@pytest.mark.parametrize(
    "changes",
    [{"mixed_precision": "bf16"}, {"use_8bit_adam": True}, {"scale_lr": True}, {"allow_tf32": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_flag_trains(changes, train, flags, tmp_path):
    assert train(flags(**changes)) == 0
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))
    if "scale_lr" in changes:
        assert metrics(tmp_path / "run")[0]["lr"] == pytest.approx(2e-4)


@pytest.mark.usefixtures("no_result")
def test_another_decoder_scores(train, flags, world, tmp_path):
    from diffusers import AutoencoderTiny

    channels = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    AutoencoderTiny(**channels, **blocks).save_pretrained(tmp_path / "taesd")
    assert train(flags(max_train_steps=1, reward_vae=tmp_path / "taesd", output_dir=tmp_path / "tiny")) == 0
    assert train(flags(max_train_steps=1, output_dir=tmp_path / "own")) == 0
    assert metrics(tmp_path / "tiny")[0]["reward/mean"] != metrics(tmp_path / "own")[0]["reward/mean"]


PLAN = {  # 8 prompts, n = 5, m = 3, guided branches: two rows each; 5 guided steps to generate
    "SFT": "240 rows to score, 48 rows to train, per process",
    "RLHF": "80 rows to generate, 240 rows to score, 48 rows to reference, 96 rows to train, per process",
}


def test_dry_run_prints_the_plan_and_touches_nothing(method, train, flags, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a dry run loaded weights")

    monkeypatch.setattr(model_source.Source, "load", refuse)
    assert train(flags(dry_run=True, gradient_accumulation_steps=4, num_noisy_latents=5, branch_guidance_scale=2)) == 0
    plan = {line[:18].strip(): line[20:] for line in capsys.readouterr().out.splitlines()}
    assert plan["rows per step"] == "8 = 2 per batch x 4 accumulated x 1 processes"
    assert plan["forwards per step"] == PLAN[method]
    assert plan["decodes per step"] == "120, per process"
    assert plan["steps"] == "2, 2 per epoch, 1.00 epochs"
    assert "GiB" in plan["memory held"]
    assert not (tmp_path / "run").exists()


def test_dry_run_does_not_wait_for_the_models_code_to_be_imported(method, flags):
    code = (
        f"import sys, {Path(SCRIPTS[method]).stem} as script\n"
        "status = script.cli(sys.argv[1:])\n"
        "assert not {'diffusers.models', 'peft', 'bitsandbytes'} & set(sys.modules)\nsys.exit(status)"
    )
    command = [sys.executable, "-c", code, *flags(dry_run=True, use_lora=True)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("weights", ["whole", "sharded", "of a variant", "absent", "damaged", "damaged index"])
def test_parameters_are_counted_without_the_model(weights, world, tmp_path):
    from sharpening.running import launching

    args = SimpleNamespace(
        lora_rank=3, lora_alpha=None, gradient_checkpointing=False, enable_xformers_memory_efficient_attention=False,
        enable_npu_flash_attention=False,
    )  # fmt: skip
    variant = "fp16" if weights == "of a variant" else None
    sharded = weights in ("sharded", "damaged index")
    options = {"max_shard_size": "20KB"} if sharded else {"variant": variant}
    UNet2DConditionModel.from_pretrained(world.model, subfolder="unet").save_pretrained(tmp_path / "unet", **options)
    files = list((tmp_path / "unet").glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    for index in (tmp_path / "unet").glob("*.index.json") if weights == "damaged index" else ():
        index.write_text(index.read_text()[:50])
    for file in files:
        if weights == "absent":
            file.unlink()
        elif weights == "damaged":
            file.write_bytes(file.read_bytes()[:100])
    copy = model_source.Source("pretrained_model_name_or_path", str(tmp_path), variant=variant)
    assert bool(copy.shapes("unet")) == (weights in ("whole", "sharded", "of a variant"))
    for args.use_lora in (False, True):
        source = model_source.Source("pretrained_model_name_or_path", str(world.model))
        unet = sdxl.load_unet(args, source, torch.device("cpu"), torch.float32)
        total = sum(parameter.numel() for name, parameter in unet.named_parameters() if "lora_" not in name)
        trained = sum(parameter.numel() for parameter in sdxl.trainable_parameters(unet))
        assert launching.count_unet_parameters(args, copy) == (total, trained)


def test_encoders_and_generation_equal_the_diffusers_pipeline(world):
    pipeline = StableDiffusionXLPipeline.from_pretrained(world.model)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    source = model_source.Source("pretrained_model_name_or_path", str(world.model))
    device = torch.device("cpu")
    encoders = sdxl.TextEncoders.load(source, device, torch.float32)
    prompts = ["a red circle on a white background", "words outside of the grammar, and more of them " * 20]
    embeds, pooled = encoders.encode(prompts)
    expected_embeds, _, expected_pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    torch.testing.assert_close(embeds, expected_embeds)
    torch.testing.assert_close(pooled, expected_pooled)

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = Schedule.from_config(source.read_json("scheduler/scheduler_config.json"), 5)
    condition = sdxl.Condition(embeds, pooled, sdxl.default_time_ids(2, 32, device))
    unconditional = sdxl.unconditional_embedding(source, encoders)
    predict, guide = sdxl.branch_model(pipeline.unet, condition, unconditional, 5.0)
    with torch.no_grad():
        ours = sdxl.decode_latents(pipeline.vae, generate(predict, schedule, noise, guide), 1)
    theirs = pipeline(
        prompts, num_inference_steps=5, guidance_scale=5.0, latents=noise, output_type="pt", height=32, width=32
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("no_result")
def test_caches_are_made_once(method, train, flags, world, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    assert train(flags(cache_dir=cache, output_dir=tmp_path / "first")) == 0

    def refuse(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(sdxl, "encode_images", refuse)
    monkeypatch.setattr("sharpening.data.encoding_cache._add_captions", refuse)
    assert train(flags(cache_dir=cache, output_dir=tmp_path / "second")) == 0
    assert list(map(values, metrics(tmp_path / "first"))) == list(map(values, metrics(tmp_path / "second")))
    kinds = {path.name.split("-")[0] for path in Path(cache, "diffusion_sharpening").glob("*[!k]")}
    assert kinds == ({"latents", "embeddings"} if method == "SFT" else {"embeddings"})  # RLHF encodes no image
