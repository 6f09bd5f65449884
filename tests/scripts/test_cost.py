"""What a step of either script costs: the rows it promises are those that pass through the models; the dry run."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from sharpening import model_source, sdxl
from sharpening.running import launching
from tests.support.hooks import OFF_GRID
from tests.support.runs import ROOT, SCRIPTS, metrics, plan_of

SAMPLES = {"reward_on": "sample", "latents_per_prompt": "n"}


@pytest.fixture(params=["SFT", "RLHF"])
def method(request):
    return request.param


@pytest.fixture
def rows_of_a_step(method, train, flags, forwards, decodes, tmp_path):
    """The rows of a step by purpose, as the script promises and as its models see them, a mean over two steps."""

    runs = itertools.count()

    def of(**changes):
        script = importlib.import_module(SCRIPTS[method].removesuffix(".py"))
        command = flags(**{**OFF_GRID, **changes}, max_train_steps=2, output_dir=tmp_path / str(next(runs)))
        forwards.clear(), decodes.clear()
        assert train(command) == 0
        promised = script.rows_per_step(script.parse_args(command))
        seen = dict.fromkeys(promised, 0)
        for forward in forwards:
            seen[forward.purpose] += len(forward.x) / 2
        seen["decode"] += sum(decodes) / 2
        return promised, seen

    return of


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("method", ["SFT"], indirect=True)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_noisy_latents": 1, "trajectory_nums": 1},
        {"num_noisy_latents": 1},
        {"num_noisy_latents": 1, "branch_guidance_scale": 2},
        {"num_noisy_latents": 4, "trajectory_nums": 2, "gradient_accumulation_steps": 2},
        {"branch_guidance_scale": 2},
        {"preset": "released"},
        {"preset": "released", "branch_guidance_scale": 2},
        {"preset": "released", "num_noisy_latents": 1},
        {"train_rows": 1},
        {"use_lora": True, "gradient_checkpointing": True},
    ],
    ids=lambda changes: ",".join(map(str, changes)) or "defaults",
)
def test_rows_of_sft_are_those_promised(changes, rows_of_a_step):
    promised, seen = rows_of_a_step(**changes)
    assert seen == promised


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("method", ["RLHF"], indirect=True)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_noisy_latents": 4, "trajectory_nums": 2, "gradient_accumulation_steps": 2},
        {"branch_guidance_scale": 2, "guidance_scale": 1},
        {"latents_per_prompt": "n", "share_noise_in_pair": True},
        {"reference_steps": "first", "train_rows": 1},
        {**SAMPLES, "trajectory_nums": 1, "train_rows": 2},
        {**SAMPLES, "trajectory_nums": 1, "train_rows": 1},
        {**SAMPLES, "trajectory_nums": 2, "train_rows": 4},
        {**SAMPLES, "trajectory_nums": 2, "train_rows": 3},
        {**SAMPLES, "trajectory_nums": 2, "branch_guidance_scale": 2},
        {"preset": "released"},
        {"preset": "released", "branch_guidance_scale": 2},
        {**SAMPLES, "preset": "released"},
        {"generation_reuse": 2},
        {**SAMPLES, "generation_reuse": 2, "trajectory_nums": 1},
        {"use_lora": True, "gradient_checkpointing": True},
        {**SAMPLES, "use_lora": True, "train_rows": 1},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()) or "defaults",
)
def test_rows_of_rlhf_are_those_promised(changes, rows_of_a_step):
    """Only selected pairs see the reference and a gradient; a generation is counted once for all updates it serves."""
    promised, seen = rows_of_a_step(**changes)
    assert seen == promised


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("method", ["RLHF"], indirect=True)
@pytest.mark.parametrize("m", [1, 2])
def test_no_forward_is_done_twice_where_samples_are_judged_and_a_pair_fits_one_slice(m, rows_of_a_step):
    fitting = 2 * m  # the states of one of the 2 pairs
    _, at_once = rows_of_a_step(**SAMPLES, trajectory_nums=m, train_rows=fitting)
    _, sliced = rows_of_a_step(**SAMPLES, trajectory_nums=m, train_rows=fitting - 1)
    assert at_once == {**sliced, "score": sliced["score"] - 4} and at_once["train"] == 2 * fitting


@pytest.mark.parametrize("method", ["SFT"], indirect=True)
@pytest.mark.parametrize("m", [1, 3])
def test_one_branch_is_neither_scored_nor_judged(m, train, flags, tmp_path, forwards, decodes, caplog):
    """There is nothing to select: m states are trained on, and reaching the last of them costs m - 1 forwards."""
    options = {**OFF_GRID, "num_noisy_latents": 1, "trajectory_nums": m, "branch_image_steps": 1}
    # This reward could not be loaded: its weights are not here.
    assert train(flags(**options, max_train_steps=22, reward_model="image_reward")) == 0
    assert decodes == []
    rows = {gradient: sum(len(f.x) for f in forwards if f.gradient == gradient) for gradient in (False, True)}
    assert rows == {False: 22 * 2 * (m - 1), True: 22 * 2 * m}
    for line in metrics(tmp_path / "run"):
        assert line["loss"] > 0 and not [name for name in line if name.startswith("reward")]
    assert not (tmp_path / "run" / "reward_curve.png").exists() and not (tmp_path / "run" / "images").exists()
    # 20 steps without any spread of rewards are no flat reward.
    assert not [record for record in caplog.records if "being selected" in record.getMessage()]


PLAN = {  # 8 prompts, n = 5, m = 3, guided branches: two rows each; 5 guided steps to generate
    "SFT": "240 rows to score, 24 rows to train, per process",
    "RLHF": "80 rows to generate, 240 rows to score, 48 rows to reference, 48 rows to train, per process",
}


def test_dry_run_prints_the_plan_and_touches_nothing(method, train, flags, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a dry run loaded weights")

    monkeypatch.setattr(model_source.Source, "load", refuse)
    assert train(flags(dry_run=True, gradient_accumulation_steps=4, num_noisy_latents=5, branch_guidance_scale=2)) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100 and said.count("\n") <= 20  # a screen has room for it and the bar
    plan = plan_of(said)
    assert plan["rows per step"] == "8 = 2 per batch x 4 accumulated x 1 processes"
    assert plan["forwards per step"] == PLAN[method]
    assert plan["decodes per step"] == "120, per process"
    assert plan["steps"] == "2, 2 per epoch, 1.00 epochs"
    assert "GiB" in plan["memory held"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["RLHF"])
def test_plan_counts_fresh_generations_and_warns_of_few(train, flags, capsys, caplog):
    options = {"dry_run": True, "preset": "efficient", "max_train_steps": 41}
    assert train(flags(**options)) == 0
    assert "11 fresh ones, each for 4 steps" in capsys.readouterr().out and not caplog.records
    assert train(flags(**options, generation_reuse=8)) == 0
    assert "6 fresh ones, each for 8 steps" in capsys.readouterr().out
    assert "6 fresh generations are few" in caplog.text and "lower --generation_reuse" in caplog.text


@pytest.mark.parametrize("method", ["RLHF"])
def test_first_lines_name_the_preset_that_gained(train, flags, capsys):
    said = []
    for changes in ({}, {"reward_on": "sample", "latents_per_prompt": "n"}, {"preset": "efficient"}):
        assert train(flags(dry_run=True, **changes)) == 0
        said.append("--preset=efficient gained" in plan_of(capsys.readouterr().out).get("note", ""))
    assert said == [True, False, False]


def test_memory_held_counts_the_copies_of_autocast_and_says_what_it_leaves_out():
    whole = launching.memory_held((2**30, 2**30), half=True, adam_8bit=False, ema=False, reference=True)
    assert whole.startswith("20.00 GiB") and "weights 4.00 + autocast 2.00 + gradients 4.00 + Adam 8.00" in whole
    assert "without activations, the VAE, the reward model" in whole
    lora = launching.memory_held((2**30, 2**29), half=True, adam_8bit=False, ema=False, reference=False)
    assert "weights 3.00 + autocast 1.00" in lora  # frozen weights are in half precision already
    assert "autocast" not in launching.memory_held((2**30, 2**30), False, False, False, False)
    parts = launching.memory_held((2**30, 2**30), half=True, adam_8bit=False, ema=True, reference=True, parts=4)
    assert parts.startswith("5.50 GiB") and "weights 1.00 + gradients 1.00 + Adam 2.00 + EMA 1.00" in parts
    assert "without the block that is gathered, activations" in parts


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
    for rank in (None, 3):
        source = model_source.Source("pretrained_model_name_or_path", str(world.model))
        lora = None if rank is None else sdxl.lora_config(rank, None)
        unet = sdxl.load_unet(source, torch.device("cpu"), torch.float32, lora)
        total = sum(parameter.numel() for name, parameter in unet.named_parameters() if "lora_" not in name)
        trained = sum(parameter.numel() for parameter in sdxl.trainable_parameters(unet))
        assert launching.count_unet_parameters(copy, rank) == (total, trained)
