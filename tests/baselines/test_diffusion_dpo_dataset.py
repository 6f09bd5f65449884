"""Diffusion-DPO on compared images: its loss against autograd, its pairs, what it does not load, resume, refusals."""

import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

from baselines import diffusion_dpo, diffusion_dpo_dataset
from sharpening import sdxl
from tests.baselines import literal
from tests.baselines.test_diffusion_dpo import errors_of_pairs, whole_loss
from tests.support.captioned_files import write_pairs
from tests.support.runs import ROOT, SPEED, metrics, plan_of, same_files, without_speed
from tiny_world import make_shapes_dataset
from tiny_world.shapes import draw, training_captions, wrong_caption

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
STATE = (WEIGHTS, WEIGHTS.replace("unet/", "unet_ema/"), "optimizer.bin", "custom_checkpoint_0.pkl")
CURVES = {
    "loss", "lr", "grad_norm", "preference/accuracy", "preference/logits", "preference/kl",
    "preference/log_ratio_best", "preference/log_ratio_worst",
}  # fmt: skip


@pytest.fixture
def method():
    return "DPO_DATASET"


def compared(count, seed=0):
    """Rows of drawings that show their caption and drawings that do not, in random order, every fifth pair a tie."""
    rng, rows = np.random.default_rng(seed), []
    captions = training_captions()
    for number in range(count):
        caption = captions[number * 7 % len(captions)]
        pair = [draw(caption, rng), draw(wrong_caption(caption, rng), rng)]
        label = int(rng.integers(2))
        rows.append((*(pair if label else pair[::-1]), 0.5 if number % 5 == 4 else label, caption))
    return rows


@pytest.fixture
def pairs(tmp_path):
    """Flags that make 8 pairs and 2 ties the data. The reward is the default, which would have to be downloaded."""
    folder = write_pairs(tmp_path / "pairs", compared(10))
    return {"train_data_dir": None, "dataset_name": folder, "reward_model": None}


# ------------------------------------------------------------------------------------------------ the loss, the pairs


def test_loss_is_that_of_pairs_of_samples():
    for beta in (1.0, 2500.0):
        ours = diffusion_dpo_dataset.dpo_loss(beta, *errors_of_pairs())
        theirs = diffusion_dpo.dpo_loss(beta, *errors_of_pairs())
        for one, other in zip(ours[:3], theirs[:3], strict=True):
            assert torch.equal(one, other)


@pytest.mark.usefixtures("no_result", "in_double")
@pytest.mark.parametrize(("lora", "train_rows"), [(False, 5), (False, 100), (True, 2)])
def test_gradient_is_that_of_the_literal_loss_on_the_images_of_the_data_set(
    lora, train_rows, train, flags, world, pairs, seen, tmp_path
):
    """Of the second step, where model and reference are apart; the preferred image first."""
    options = {**pairs, "train_batch_size": 4, "beta_dpo": 30, "learning_rate": 1e-3, "max_grad_norm": 1e9}
    options |= {"center_crop": True, "train_rows": train_rows, "use_lora": lora}
    assert train(flags(**options)) == 0
    assert literal.of(seen, "generate") == [] and seen.decodes == []
    trained = literal.of(seen, "train", step=1)
    assert len(trained) == {5: 2, 100: 1, 2: 4}[train_rows]
    x, t, condition = literal.together(trained)

    rows, draws = literal.drawn(1, 8, 4)
    kept = [row for row in compared(10) if row[2] != 0.5]
    images = [image for row in rows for image in (kept[row][:2] if kept[row][2] else kept[row][1::-1])]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    vae = AutoencoderKL.from_pretrained(world.model, subfolder="vae")
    drawn = literal.noising(draws)
    eps = drawn.eps[:, 0].repeat_interleave(2, 0)
    torch.testing.assert_close(literal.clean(x, t, eps), sdxl.encode_images(vae, pixels).double(), rtol=0, atol=1e-3)
    assert t.tolist() == drawn.t.repeat_interleave(2).tolist()
    assert condition.time_ids.unique(dim=0).tolist() == [[32, 32, 0, 0, 32, 32]]

    unet = literal.unet_with(world.model, seen.updates[1].weights, lora)
    loss = whole_loss(unet, literal.unet_with(world.model), x, t, condition, eps, torch.ones(4), 30)
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in sdxl.trainable_parameters(unet)])
    assert expected.norm() > 0
    assert (seen.updates[1].gradient - expected).norm() <= 1e-9 * expected.norm()
    assert metrics(tmp_path / "run")[1]["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)


@pytest.mark.usefixtures("no_result", "in_double")
def test_accumulated_batches_equal_a_bigger_batch(train, flags, pairs, seen, tmp_path):
    options = {**pairs, "learning_rate": 1e-4, "max_grad_norm": 1e9, "proportion_empty_prompts": 0.3}
    assert train(flags(**options, train_batch_size=4, output_dir=tmp_path / "4x1")) == 0
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "train_rows": 2}
    assert train(flags(**options, **split, output_dir=tmp_path / "1x4")) == 0
    for one, other in zip(seen.updates[:2], seen.updates[2:], strict=True):
        assert one.gradient.norm() > 0 and (one.gradient - other.gradient).norm() < 1e-9 * one.gradient.norm()


# ------------------------------------------------------------------------------------------------------------ the run


def test_plan_says_what_it_trains_on_and_a_dry_run_touches_nothing(train, flags, pairs, tmp_path, capsys):
    assert train(flags(**pairs, gradient_accumulation_steps=2, dry_run=True)) == 0
    plan = plan_of(capsys.readouterr().out)
    assert plan["data"] == f"8 pairs of {pairs['dataset_name']} (10 read: 2 ties left out)"
    assert plan["pairs"] == "images of the data set, by its labels; the reward judges validation images alone"
    assert plan["forwards per step"] == "8 rows to reference, 8 rows to train, per process"
    assert plan["decodes per step"] == "0, per process" and "reference" in plan["memory held"]
    assert plan["steps"] == "2, 2 per epoch, 1.00 epochs" and not (tmp_path / "run").exists()


def test_a_run_leaves_its_curves_and_a_pipeline_that_stock_diffusers_loads(train, flags, world, pairs, tmp_path):
    changes = {"reward_model": "shapes", "validation_prompt": "a red circle on a white background"}
    changes |= {"validation_steps": 2, "num_validation_images": 2, "infer_steps": 2, "branch_image_steps": 2}
    assert train(flags(**{**pairs, **changes}, learning_rate=1e-3)) == 0
    first, second = metrics(tmp_path / "run")
    validated = {"validation/reward", "validation/reward_standard_error"}
    assert first.keys() == CURVES | SPEED - {"generation_time_share"} | {"step"}
    assert second.keys() == first.keys() | validated
    assert all(math.isfinite(value) for line in (first, second) for value in line.values())
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5) and first["preference/accuracy"] == 0.5
    shown = {path.name for path in (tmp_path / "run" / "images").iterdir()}
    assert {"branches_best_000002.png", "branches_worst_000002.png"} <= shown
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run")
    base = UNet2DConditionModel.from_pretrained(world.model, subfolder="unet")
    assert not any(map(torch.equal, pipeline.unet.parameters(), base.parameters()))
    assert "Diffusion-DPO on compared images ([arXiv" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_two_plus_two_steps_equal_four_bit_for_bit(lora, train, flags, pairs, tmp_path):
    options = {**pairs, "max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True, "learning_rate": 1e-3}
    options |= {"use_lora": lora, "proportion_empty_prompts": 0.3}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(flags(**options, output_dir=whole)) == 0
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", resumed)
    assert train(flags(**options, output_dir=resumed, resume_from_checkpoint="latest")) == 0
    assert same_files(whole / "checkpoint-4", resumed / "checkpoint-4", STATE[2:] if lora else STATE) == []
    assert [*map(without_speed, metrics(whole))] == [*map(without_speed, metrics(resumed))]


REFUSED = {
    "no data": ({"dataset_name": None}, ["no training data: give --dataset_name (hub id, folder, parquet, tars)\n"]),
    "an image folder": ({"train_data_dir": "."}, ["--train_data_dir", "--help"]),
    "prompts": ({"prompts_file": "p.txt"}, ["--prompts_file", "--help"]),
    "an image column": ({"image_column": "jpg_0"}, ["--image_column", "--help"]),
    "samples": ({"num_noisy_latents": 2}, ["--num_noisy_latents", "--help"]),
    "rounds": ({"rounds": 2}, ["--rounds", "--help"]),
    "half a pair": ({"train_rows": 1}, ["--train_rows is 1", "a pair has 2 rows", "raise it"]),
    "beta of zero": ({"beta_dpo": 0}, ["--beta_dpo is 0", "above 0"]),
    "captions of another name": ({"caption_column": "text"}, ["has no column text", "jpg_0, jpg_1 and label_0"]),
    "captioned images": ({"dataset_name": "shapes"}, ["no column jpg_0 and no jpg_1 and no label_0", "rename"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case, train, flags, world, pairs, tmp_path, capsys):
    changes, said = REFUSED[case]
    if changes.get("dataset_name"):
        changes = {"dataset_name": world.shapes}
    assert train(flags(**{**pairs, **changes})) == 2
    (error,) = [f"{line}\n" for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    for part in said:
        assert part in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tiny_world_follows_its_prompts_better_after_training_on_compared_drawings(train, flags, tmp_path):
    """In 50 steps of 16 pairs; the reward, which says how well an image shows its caption, is not trained on."""
    prompts = tmp_path / "validation.txt"
    prompts.write_text("\n".join(training_captions()))
    make_shapes_dataset.write_pairs(tmp_path / "pairs", 400)
    options = {"train_data_dir": None, "dataset_name": tmp_path / "pairs"}
    options |= {"pretrained_model_name_or_path": ROOT / "tiny_world" / "sdxl", "train_batch_size": 16, "beta_dpo": 200}
    options |= {"center_crop": True, "use_ema": True, "ema_decay": 0.9, "infer_steps": 10, "train_rows": 32}
    options |= {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 1000, "timestep_bias_begin": 400}
    options |= {"validation_prompts_file": prompts, "num_validation_images": 2, "validation_guidance_scale": 1}
    options |= {"validation_epochs": 0, "score_batch_size": 45, "decode_batch_size": 45}
    reached = {}
    for steps, rate in ((1, 1e-30), (50, 1e-4)):
        run = tmp_path / str(steps)
        length = {"max_train_steps": steps, "validation_steps": steps, "learning_rate": rate}
        assert train(flags(**options, **length, output_dir=run)) == 0
        reached[steps] = metrics(run)[-1]["validation/reward"]
    assert reached[50] > reached[1] + 0.1
