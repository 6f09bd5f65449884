"""LoRA in both scripts: what trains, what is saved, what diffusers makes of it, and the reference of RLHF."""

import re
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from sharpening import model_source, sdxl
from sharpening.reference import Reference
from tests.support.objective import problem
from tests.support.runs import metrics, plan_of, same_files, same_tensors
from tiny_world.make_tiny_sdxl import make_pipeline

LORA = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8.0, "infer_steps": 5, "learning_rate": 1e-2}
ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture(params=["SFT", "RLHF"])
def method(request):
    return request.param


@pytest.fixture
def trained(forwards):
    """The UNet that the script has trained, as it is used to draw."""
    return lambda: next(forward.unet for forward in reversed(forwards) if forward.gradient).eval()


def outputs(unet):
    _, condition, x_0, _, t = problem(make_pipeline(seed=0), 4, 1, torch.float32)
    with torch.no_grad():
        return sdxl.predict_output(unet, x_0, t, condition)


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_result_is_an_adapter_that_stock_diffusers_applies_as_it_was_trained(
    alpha, train, flags, world, trained, tmp_path
):
    assert train(flags(**{**LORA, "lora_alpha": alpha})) == 0
    pipeline = StableDiffusionXLPipeline.from_pretrained(world.model)
    before = outputs(pipeline.unet)
    pipeline.load_lora_weights(tmp_path / "run")
    torch.testing.assert_close(outputs(pipeline.unet), outputs(trained()), rtol=1e-5, atol=1e-6)
    assert (outputs(pipeline.unet) - before).abs().max() > 1e-3
    assert not (tmp_path / "run" / "model_index.json").exists() and not (tmp_path / "run" / "unet").exists()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "pipe.load_lora_weights" in card and "\n- lora\n" in card and str(world.model) in card


def test_only_the_adapter_trains_and_only_it_is_optimized_and_kept(train, flags, world, trained, tmp_path):
    assert train(flags(**LORA, checkpointing_steps=2, use_ema=True)) == 0
    base = UNet2DConditionModel.from_pretrained(world.model, subfolder="unet").state_dict()
    state = trained().state_dict()
    adapter = [name for name in state if "lora_" in name]
    assert adapter and all(state[name].abs().max() > 0 for name in adapter)
    for name, value in state.items():
        if "lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")]), name
    checkpoint = tmp_path / "run" / "checkpoint-2"
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    assert len(optimizer["state"]) == len(adapter)
    assert not (checkpoint / "unet").exists() and (checkpoint / "lora" / ADAPTER).exists()
    pipeline = StableDiffusionXLPipeline.from_pretrained(world.model)
    pipeline.load_lora_weights(checkpoint / "lora_ema")  # the average can be tried as well
    assert (outputs(pipeline.unet) - outputs(trained())).abs().max() > 0


@pytest.mark.slow
def test_three_plus_three_steps_equal_six_bit_for_bit(train, flags, tmp_path):
    options = {**LORA, "max_train_steps": 6, "checkpointing_steps": 3, "use_ema": True, "lr_scheduler": "cosine"}
    assert train(flags(**options, output_dir=tmp_path / "whole")) == 0
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", resumed / "checkpoint-3")
    assert train(flags(**options, output_dir=resumed, resume_from_checkpoint="latest")) == 0
    names = ["checkpoint-6/optimizer.bin", "checkpoint-6/custom_checkpoint_0.pkl"]
    assert same_files(tmp_path / "whole", resumed, names) == []
    for name in (f"checkpoint-6/lora/{ADAPTER}", f"checkpoint-6/lora_ema/{ADAPTER}", ADAPTER):
        assert same_tensors(tmp_path / "whole" / name, resumed / name)
    assert [line["loss"] for line in metrics(tmp_path / "whole")[3:]] == [line["loss"] for line in metrics(resumed)]


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        (LORA, {}, "--use_lora: .* was written with it; add the flag"),
        ({}, LORA, "--use_lora: .* was written without it; leave the flag out"),
        (LORA, {**LORA, "lora_rank": 5}, "--use_lora: .* no adapter that fits"),
        (LORA, {**LORA, "use_ema": True}, "--use_ema: .* was written without it"),
    ],
    ids=["without", "with", "another rank", "with EMA"],
)
def test_resuming_with_another_kind_of_weights_is_refused(
    first, then, said, train, flags, trained_once, tmp_path, capsys
):
    common = {"max_train_steps": 1, "infer_steps": 5}
    checkpoint = trained_once(**{**common, **first}, checkpointing_steps=1) / "checkpoint-1"
    shutil.copytree(checkpoint, tmp_path / "run" / checkpoint.name)
    assert train(flags(**{**common, **then, "max_train_steps": 2}, resume_from_checkpoint="latest")) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert re.search(said, error)


def test_dry_run_counts_the_memory_of_the_adapter_alone(train, flags, capsys, method):
    assert train(flags(dry_run=True, use_lora=True)) == 0
    plan = plan_of(capsys.readouterr().out)
    assert "LoRA of rank 16: 0.0M train" in plan["model"]
    assert "reference" not in plan["memory held"]
    assert train(flags(dry_run=True)) == 0
    plan = plan_of(capsys.readouterr().out)
    assert ("reference" in plan["memory held"]) == (method == "RLHF")


@pytest.mark.usefixtures("no_result")
def test_base_is_held_in_the_compute_dtype_and_the_adapter_in_float32(train, flags, trained):
    assert train(flags(**LORA, mixed_precision="bf16")) == 0
    kinds = {("lora_" in name, parameter.dtype) for name, parameter in trained().named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_adapter_begins_as_the_identity_and_switched_off_is_the_base_model_bit_for_bit(world):
    """The reference of RLHF with LoRA."""
    source = model_source.Source("pretrained_model_name_or_path", str(world.model))
    unet = sdxl.load_unet(source, torch.device("cpu"), torch.float32, sdxl.lora_config(4, None)).eval()
    base = UNet2DConditionModel.from_pretrained(world.model, subfolder="unet")
    assert torch.equal(outputs(unet), outputs(base))
    with torch.no_grad():
        for parameter in sdxl.trainable_parameters(unet):
            parameter.normal_()
    count = len(sdxl.trainable_parameters(unet))
    assert not torch.allclose(outputs(unet), outputs(base), atol=1e-2)
    with Reference(unet, None).unet() as reference:
        assert torch.equal(outputs(reference), outputs(base))
    assert not torch.allclose(outputs(unet), outputs(base), atol=1e-2)  # and on again
    assert len(sdxl.trainable_parameters(unet)) == count > 0


@pytest.mark.parametrize("prediction_type", [None, "v_prediction"])
def test_card_says_how_to_sample_what_was_trained(prediction_type, train, flags, world, tmp_path, trained):
    """The card's own code, run as it stands, draws with the adapter and the scheduler that it was trained for."""
    assert train(flags(**{**LORA, "prediction_type": prediction_type, "max_train_steps": 1})) == 0
    code = (tmp_path / "run" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace('load_lora_weights("run")', f'load_lora_weights("{tmp_path}/run")'), names)
    assert names["pipe"].scheduler.config.prediction_type == (prediction_type or "epsilon")
    torch.testing.assert_close(outputs(names["pipe"].unet), outputs(trained()), rtol=1e-5, atol=1e-6)
