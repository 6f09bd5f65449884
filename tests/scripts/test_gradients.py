"""What the first step of both scripts learns: which flags change it, which do not, and standard fine-tuning."""

import math

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from tests.support.runs import metrics, without_speed

# How far rounding carries, relative to the norm: RLHF's gradient is the difference of two that nearly cancel, and its
# latents come out of 25 steps whose rounding depends on the batch.
ROUNDING = {"SFT": 1e-5, "RLHF": 4e-3}
only_sft = pytest.mark.parametrize("method", ["SFT"], indirect=True)


@pytest.fixture(params=["SFT", "RLHF"])
def method(request):
    return request.param


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
    left, right = without_speed(metrics(whole)[0]), without_speed(metrics(parts)[0])
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
    (batch,) = DrawSampler(len(images), 4, 0, 1, 3, 0, 1)
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


@pytest.mark.usefixtures("no_result")
def test_dropped_prompts_train_without_and_are_judged_with_their_caption(method, train, flags, tmp_path, forwards):
    asked = tmp_path / "asked.txt"
    (tmp_path / "mine.py").write_text(
        "def listen(images, prompts):\n"
        f"    with open({str(asked)!r}, 'a') as file:\n        file.writelines(p + '\\n' for p in prompts)\n"
        "    return images.mean((1, 2, 3))\n"
    )
    options = {"reward_model": f"{tmp_path}/mine.py:listen", "max_train_steps": 1, "infer_steps": 5}
    assert train(flags(**options, proportion_empty_prompts=1.0)) == 0
    # What is generated (RLHF) is for the prompt, the other half of the rows for guidance: only training drops it.
    generating = [forward.without_prompt for forward in forwards if not forward.without_prompt.all()]
    assert len(generating) == {"SFT": 0, "RLHF": 5}[method] and len(forwards) > len(generating)
    for rows in generating:
        with_prompt, without = rows.chunk(2)
        assert not with_prompt.any() and without.all()
    prompts = asked.read_text().splitlines()
    assert prompts and all("background" in prompt for prompt in prompts)


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
        {"train_rows": 1},
        {"train_rows": 5},
        {"train_rows": 1000},
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


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("changes", [{"train_rows": 1}, {"train_rows": 5}, {"train_rows": 1000}], ids=str)
@pytest.mark.parametrize("method", ["RLHF"], indirect=True)
def test_rows_change_cost_and_not_the_gradient_where_samples_are_judged(changes, first_gradient):
    """1000 rows are one slice, and then one forward gives errors and gradient."""
    samples = {"reward_on": "sample", "latents_per_prompt": "n", "num_noisy_latents": 2, "infer_steps": 3}
    plain, changed = first_gradient(**samples), first_gradient(**samples, **changes)
    assert (plain - changed).norm() < 10 * ROUNDING["RLHF"] * plain.norm()
