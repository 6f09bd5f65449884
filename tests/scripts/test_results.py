"""What a run of either script leaves: curves, images, the trained pipeline; and what it says when it fails."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sharpening.running import tracking, validation
from sharpening.running.metric_names import IN_GROUP, grouped
from tests.support.runs import ROOT, SCRIPTS, metrics, same_files
from tiny_world.make_tiny_sdxl import make_pipeline

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


@pytest.fixture(params=["SFT", "RLHF"])
def method(request):
    return request.param


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
    assert set(grouped(lines[0])) | set(grouped(lines[1])) == set(accumulator.Tags()["scalars"])
    assert "validation/images" in accumulator.Tags()["images"]
    for name in ("reward/best", "grad_norm"):
        logged = {event.step: event.value for event in accumulator.Scalars(IN_GROUP.get(name, name))}
        assert logged == {line["step"]: pytest.approx(line[name]) for line in lines}
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


def test_validation_draws_with_sampling_steps_of_its_own(train, flags, tmp_path):
    """Warm-up begins at a rate of 0, so that after one step every run still has the weights it began with."""
    options = {"validation_prompt": "a red circle on a white background", "validation_steps": 1, "max_train_steps": 1}
    options |= {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1}

    def reward(**steps):
        folder = tmp_path / "_".join(steps)
        assert train(flags(**options, **steps, output_dir=folder)) == 0
        return metrics(folder)[0]["validation/reward"]

    few, many = reward(infer_steps=3), reward(infer_steps=9, validation_infer_steps=9)
    assert reward(validation_infer_steps=9, infer_steps=3) == many != few


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


@pytest.mark.parametrize("use_lora", [False, True])
def test_whoever_may_read_the_settings_may_read_the_weights(use_lora, trained_once):
    run = trained_once(use_lora=use_lora, use_ema=True, max_train_steps=1, checkpointing_steps=1, infer_steps=3)
    (mode,) = {path.stat().st_mode for path in run.rglob("state.json")}
    weights = list(run.rglob("*.safetensors"))
    assert len(weights) > 2 and {path.stat().st_mode for path in weights} == {mode}


def test_curves_without_a_value_are_still_json_and_drawn(tmp_path):
    """With fp16 a scaler skips a step whose gradient is not finite; such a step has no `grad_norm`."""
    path = tmp_path / "metrics.jsonl"
    good = {"reward/mean": 1.0, "reward/spread": 0.5, "reward/best": 2.0, "reward/worst": 0.0}
    path.write_text('{"step": 1, "reward/mean": 1.0, "grad_norm": NaN}\n')  # as an earlier version wrote it
    file = tracking.MetricsFile(path)
    file.begin(1)
    file.append(2, {**good, "grad_norm": math.inf})
    file.append(3, {**good, "grad_norm": 0.5})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [line.get("grad_norm") for line in lines] == [None, None, 0.5]
    assert lines == tracking.read_metrics(path) and lines[1] == {"step": 2, **good}
    file.begin(0)
    file.append(1, good)
    assert tracking.plot_rewards(path, tmp_path / "curve.png")
    file.begin(0)
    file.append(1, good | {"cost/forwards": 10})
    assert tracking.plot_rewards(path, tmp_path / "both.png")
    widths = [Image.open(tmp_path / name).width for name in ("curve.png", "both.png")]
    assert widths[1] == 2 * widths[0]  # over steps, and over forwards where the run has them


def test_average_is_in_the_weights_within_and_never_on_the_host(tmp_path):
    unet = make_pipeline(seed=0).unet
    trained = [parameter.detach().clone() for parameter in unet.parameters()]
    ema = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)
    for average in ema.shadow_params:
        average.fill_(7)
    places = [parameter.data_ptr() for parameter in unet.parameters()]
    with pytest.raises(KeyError), validation.averaged_weights(unet, ema):
        assert all((parameter == 7).all() for parameter in unet.parameters())
        assert ema.temp_stored_params is None  # what diffusers keeps on the CPU
        raise KeyError
    assert all(map(torch.equal, unet.parameters(), trained))
    assert all((average == 7).all() for average in ema.shadow_params)
    assert places == [parameter.data_ptr() for parameter in unet.parameters()]


QUIET = """
import logging, pathlib, runpy, sys
from sharpening import progress
from tests.support import tiny_rewards

progress.PATIENCE = 0
clip = tiny_rewards.write_clip(pathlib.Path(sys.argv[1]))[0]
logging.root.handlers.clear()  # open_clip's first word makes one
print("=== the run", file=sys.stderr, flush=True)
sys.argv = [*sys.argv[2:], f"--clip_model={tiny_rewards.TINY}/{clip}"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SFT"], indirect=True)
def test_libraries_say_nothing_in_a_run(method, flags, tmp_path):
    """open_clip speaks on the root logger, bitsandbytes of a kernel that nothing here needs. The run says what takes
    long."""
    command = flags(reward_model="clip", use_8bit_adam=True, max_train_steps=1, checkpointing_steps=1)
    result = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path), str(ROOT / SCRIPTS[method]), *command], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    bar = r"[a-zA-Z ]+: +\d+(%\|| examples)[^]]*]"
    said = re.sub(bar, "\n", result.stderr.partition("=== the run")[2])
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    parts = ("the reward clip", "vae", "unet", "text_encoder", "text_encoder_2")
    assert lines == [
        "[RANK 0] seed 0, starting after step 0",
        *(f"loading {part} ..." for part in parts),
        "saving checkpoint-1 ...",
        f"[RANK 0] saved {tmp_path}/run/checkpoint-1",
        "saving the result ...",
        lines[-1],
    ]
    assert re.fullmatch("loading .*/model ...", lines[-1])  # what of the pipeline was not trained
