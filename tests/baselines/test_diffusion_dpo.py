"""Diffusion-DPO: its loss against its publication and against autograd, its pairs, its reference."""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel

from baselines.diffusion_dpo import dpo_loss
from sharpening import sdxl
from tests.baselines import literal
from tests.support.runs import ROOT, metrics


@pytest.fixture
def method():
    return "DPO"


# ---------------------------------------------------------------------------------------------------------- the loss


def errors_of_pairs(seed=0, count=5):
    """Errors of model and reference, (count, 2) float64."""
    return torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_published_loss_of_twice_the_beta():
    """Diffusion-DPO's training script: `-log sigmoid(-beta / 2 * (model_diff - ref_diff))`."""
    errors, reference = errors_of_pairs()
    model_difference, reference_difference = (part[:, 0] - part[:, 1] for part in (errors, reference))
    theirs = -torch.nn.functional.logsigmoid(-0.5 * 5000.0 * (model_difference - reference_difference))
    torch.testing.assert_close(dpo_loss(2500.0, errors, reference).loss, theirs, rtol=1e-10, atol=0)


def test_swapping_best_and_worst_flips_the_logits():
    errors, reference = errors_of_pairs()
    ours, swapped = dpo_loss(30.0, errors, reference), dpo_loss(30.0, errors.flip(1), reference.flip(1))
    torch.testing.assert_close(swapped.logits, -ours.logits, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.loss - swapped.loss, -ours.logits, rtol=1e-12, atol=1e-15)


def test_small_beta_gives_log_2():
    loss = dpo_loss(1e-12, *errors_of_pairs()).loss
    torch.testing.assert_close(loss, torch.full_like(loss, 2.0).log(), rtol=1e-10, atol=0)


def whole_loss(unet, reference, x, t, condition, eps, decided, beta):
    """Equation 14 of Diffusion-DPO read literally, one state at a time; rows 2 b and 2 b + 1 are the pair of prompt b.

    An undecided pair counts as 0 in the mean.
    """
    total = 0.0
    for pair in decided.nonzero().flatten().tolist():
        gains = []
        for row in (torch.tensor([2 * pair]), torch.tensor([2 * pair + 1])):
            error, reference_error = (
                torch.nn.functional.mse_loss(sdxl.predict_output(model, x[row], t[row], condition.rows(row)), eps[row])
                for model in (unet, reference)
            )
            gains.append(reference_error.detach() - error)
        total = total - torch.log(torch.sigmoid(beta * (gains[0] - gains[1])))
    return total / len(decided)


@pytest.mark.usefixtures("no_result", "in_double")
@pytest.mark.parametrize("train_rows", [2, 5, 100])
def test_loss_and_gradient_equal_autograd_of_the_literal_loss(
    train_rows, train, flags, world, prompts, seen, tmp_path
):
    """Of the second step, where model and reference are apart. Of 4 prompts 2 have samples that earn the same."""
    flat = "return images.mean((1, 2, 3)) * torch.tensor(['circle' not in prompt for prompt in prompts])"
    options = {**prompts, "reward_model": literal.write_reward(tmp_path, flat), "train_batch_size": 4, "beta_dpo": 30}
    options |= {"learning_rate": 1e-3, "max_grad_norm": 1e9, "train_rows": train_rows, "infer_steps": 2}
    assert train(flags(**options, max_train_steps=2)) == 0
    trained = literal.of(seen, "train", step=1)
    assert len(trained) == {2: 4, 5: 2, 100: 1}[train_rows]
    x, t, condition = literal.together(trained)
    rows, draws = literal.drawn(1, 4, 4)
    drawn = literal.noising(draws)
    decided = torch.tensor(["circle" not in literal.CAPTIONS[row] for row in rows])
    eps = drawn.eps[:, 0].repeat_interleave(2, 0)
    assert t.tolist() == drawn.t.repeat_interleave(2).tolist() and decided.sum() == 2
    unet, reference = (literal.unet_with(world.model, weights) for weights in (seen.updates[1].weights, None))
    loss = whole_loss(unet, reference, x, t, condition, eps, decided, 30)
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in unet.parameters()])
    assert expected.norm() > 0
    assert (seen.updates[1].gradient - expected).norm() <= 1e-10 * expected.norm()
    _, line = metrics(tmp_path / "run")
    assert line["loss"] / 2 == pytest.approx(float(loss.detach()), rel=1e-10)  # the curve is of decided pairs alone
    assert line["reward/tie_rate"] == 0.5


# ------------------------------------------------------------------------------------------- the pairs, the reference


@pytest.mark.usefixtures("no_result", "in_double")
def test_pairs_are_the_best_and_the_worst_sample_under_one_noise(train, flags, world, prompts, seen, tmp_path):
    options = {**prompts, "reward_model": literal.write_reward(tmp_path), "infer_steps": 2, "train_batch_size": 4}
    assert train(flags(**options, num_noisy_latents=4, guidance_scale=3, max_train_steps=1)) == 0
    samples = literal.samples(literal.of(seen, "generate"), 2, 3).unflatten(0, (4, 4))  # (prompts, n, ...)
    rewards = literal.brightness(world.model, samples.flatten(0, 1)).view(4, 4)
    _, draws = literal.drawn(0, 4, 4)
    for purpose in ("reference", "train"):
        x, t, _ = literal.together(literal.of(seen, purpose))
        pairs = literal.clean(x, t, literal.noising(draws).eps[:, 0].repeat_interleave(2, 0)).unflatten(0, (4, 2))
        for prompt in range(4):
            best, worst = samples[prompt][rewards[prompt].argmax()], samples[prompt][rewards[prompt].argmin()]
            torch.testing.assert_close(pairs[prompt], torch.stack([best, worst]), rtol=1e-9, atol=1e-9)
    (line,) = metrics(tmp_path / "run")
    assert line["reward/best"] == pytest.approx(float(rewards.amax(1).mean()), rel=1e-5)
    assert line["reward/worst"] == pytest.approx(float(rewards.amin(1).mean()), rel=1e-5)
    margin = line["reward/best"] - line["reward/worst"]
    assert line["reward/margin"] == pytest.approx(margin, rel=1e-5)


@pytest.mark.usefixtures("no_result")
def test_samples_equal_those_of_the_diffusers_pipeline_of_the_base(train, flags, world, prompts, seen):
    """Also after the model has moved away from it."""
    from diffusers import StableDiffusionXLPipeline

    options = {**prompts, "infer_steps": 4, "guidance_scale": 3, "num_noisy_latents": 3, "learning_rate": 1e-2}
    assert train(flags(**options, max_train_steps=2)) == 0
    pipeline = StableDiffusionXLPipeline.from_pretrained(world.model)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3, "output_type": "latent", "height": 32, "width": 32}
    for step in (0, 1):
        ours = literal.samples(literal.of(seen, "generate", step), 4, 3).split(3)
        firsts = literal.of(seen, "generate", step)[::4]
        noises = torch.cat([first.x[: len(first.x) // 2] for first in firsts]).split(3)
        rows, _ = literal.drawn(step, 4, 2)
        for row, latents, noise in zip(rows, ours, noises, strict=True):
            theirs = pipeline([literal.CAPTIONS[row]] * 3, latents=noise, **options).images
            assert (latents - theirs).abs().max() < 1e-3 * theirs.abs().max()


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_at_the_reference_nothing_is_preferred_yet(precision, lora, train, flags, tmp_path):
    """On the trained tiny model, whose norms have weights of their own: rounded, they would be another model."""
    options = {"pretrained_model_name_or_path": ROOT / "tiny_world" / "sdxl", "mixed_precision": precision}
    options |= {"train_batch_size": 4, "infer_steps": 4, "use_lora": lora}
    assert train(flags(**options, max_train_steps=1)) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert line["preference/accuracy"] == 0.5 and line["preference/logits"] == 0 and line["preference/kl"] == 0


@pytest.mark.usefixtures("no_result")
def test_reference_stays_the_base_model(train, flags, world, seen, quick, tmp_path):
    """Also after a resume: the checkpoint's weights are the model's, not the reference's."""
    options = {**quick, "checkpointing_steps": 1, "learning_rate": 1e-3}
    assert train(flags(**options, max_train_steps=1)) == 0
    assert train(flags(**options, max_train_steps=2, resume_from_checkpoint="latest")) == 0
    base = UNet2DConditionModel.from_pretrained(world.model, subfolder="unet")
    for purpose, step in (("reference", 0), ("reference", 1), ("generate", 1)):
        (reference,) = {part.unet for part in literal.of(seen, purpose, step)}
        assert all(map(torch.equal, reference.parameters(), base.parameters()))
        assert not any(parameter.requires_grad for parameter in reference.parameters())
    first, second = metrics(tmp_path / "run")
    assert first["preference/kl"] < 1e-9 < second["preference/kl"]
