"""Both training scripts, continued: exact to the bit, warned of other settings, checkpoints and caches used again."""

import json
import shutil
from pathlib import Path

import pytest
from diffusers.models.autoencoders.vae import Encoder
from transformers import CLIPTextModel

from tests.support.hooks import rows_through
from tests.support.runs import metrics, same_files, same_tensors, without_speed

STATE = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet_ema/diffusion_pytorch_model.safetensors",
    "optimizer.bin",
    "custom_checkpoint_0.pkl",
)


@pytest.fixture(params=["SFT", "RLHF"])
def method(request):
    return request.param


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
    assert list(map(without_speed, whole)) == list(map(without_speed, again))
    assert whole[0]["lr"] < whole[1]["lr"] > whole[-1]["lr"]
    # The seed was drawn, not given: the resumed run took it from the checkpoint.
    first, second = (
        json.loads((run / "checkpoint-6" / "state.json").read_text()) for run in (tmp_path / "whole", resumed)
    )
    assert first["args"]["seed"] == second["args"]["seed"] is not None


@pytest.mark.parametrize("method", ["RLHF"], indirect=True)
@pytest.mark.parametrize(
    "extra",
    [{}, {"use_ema": True, "gradient_accumulation_steps": 2}, {"use_lora": True}, {"mixed_precision": "bf16"}],
    ids=["alone", "average", "LoRA", "bf16"],
)
def test_efficient_preset_resumes_bit_for_bit_inside_a_generation(extra, train, flags, tmp_path):
    options = {"preset": "efficient", "infer_steps": 2, "max_train_steps": 6, "checkpointing_steps": 3, **extra}
    assert train(flags(**options, output_dir=tmp_path / "whole")) == 0
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", resumed)
    assert train(flags(**options, output_dir=resumed, resume_from_checkpoint="latest")) == 0
    name = "pytorch_lora_weights.safetensors" if "use_lora" in extra else "unet/diffusion_pytorch_model.safetensors"
    assert same_tensors(tmp_path / "whole" / name, resumed / name)
    whole, again = metrics(tmp_path / "whole"), metrics(resumed)
    assert list(map(without_speed, whole)) == list(map(without_speed, again))
    assert all("preference/bounded" in line for line in whole)


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
    assert len(warnings) == 1
    assert "--train_batch_size times --gradient_accumulation_steps was 2 and is now 4" in warnings[0]


@pytest.mark.usefixtures("no_result")
def test_as_many_prompts_otherwise_accumulated_are_the_same_run(train, flags, caplog):
    assert train(flags(checkpointing_steps=2, train_batch_size=2)) == 0
    other = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert train(flags(resume_from_checkpoint="latest", max_train_steps=3, **other)) == 0
    assert "never interrupted" not in caplog.text


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
@pytest.mark.parametrize("method", ["SFT"], indirect=True)
def test_checkpoint_of_another_method_is_refused(train, flags, trained_once, tmp_path, capsys):
    checkpoint = trained_once(max_train_steps=1, infer_steps=3, checkpointing_steps=1) / "checkpoint-1"
    state = json.loads((checkpoint / "state.json").read_text())
    shutil.copytree(checkpoint, tmp_path / "run" / checkpoint.name)
    state["method"] = "RLHF Diffusion-Sharpening"
    (tmp_path / "run" / checkpoint.name / "state.json").write_text(json.dumps(state))
    assert train(flags(max_train_steps=2, infer_steps=3, resume_from_checkpoint="latest")) == 2
    said = "was written by RLHF Diffusion-Sharpening, but this script is SFT Diffusion-Sharpening"
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("no_result")
def test_only_the_newest_checkpoints_are_kept(train, flags, tmp_path):
    options = {"max_train_steps": 5, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "trajectory_nums": 1}
    assert train(flags(**options)) == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.usefixtures("no_result")
def test_caches_are_made_once(method, train, flags, tmp_path):
    cache = tmp_path / "cache"
    assert train(flags(cache_dir=cache, output_dir=tmp_path / "first")) == 0

    with rows_through(Encoder) as images, rows_through(CLIPTextModel) as texts:
        assert train(flags(cache_dir=cache, output_dir=tmp_path / "second")) == 0
    assert images == [] and texts == [1, 1]  # both encoders read the prompt that stands for none
    assert list(map(without_speed, metrics(tmp_path / "first"))) == list(
        map(without_speed, metrics(tmp_path / "second"))
    )
    kinds = {path.name.split("-")[0] for path in Path(cache, "diffusion_sharpening").glob("*[!k]")}
    assert kinds == ({"latents", "embeddings"} if method == "SFT" else {"embeddings"})  # RLHF encodes no image
