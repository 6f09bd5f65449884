"""The literal reading of both algorithms learns what the scripts learn."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from benchmarks import naive
from benchmarks.script import brightness
from sharpening import sdxl
from sharpening.regression import Regression
from sharpening.selection import score_branches, select
from sharpening.trajectory import Branches, Schedule, outputs_through_sampler
from tests.support.objective import denoiser, gradient, problem
from tiny_world.tiny_sdxl import make_pipeline
from train_rlhf_diffusion_sharpening_sdxl import preference_loss
from train_sft_diffusion_sharpening_sdxl import sft_weights

BETA = 2500.0
ARGS = SimpleNamespace(beta_dpo=BETA, worst_ratio_bound=math.inf, reward_margin_scale=1.0, reward_margin="inside")


@pytest.mark.parametrize("method", ["SFT", "RLHF"])
@pytest.mark.parametrize(("n", "m", "t"), [(2, 1, 981), (3, 3, 400), (3, 3, 41)], ids=["m = 1", "whole", "ends early"])
def test_literal_reading_has_the_loss_and_the_gradient_of_the_scripts(method, n, m, t):
    """With `--backprop_through_sampler`, as the literal reading has it."""
    pipeline = make_pipeline(seed=0)
    unet, condition, x_0, eps, start = problem(pipeline, 1, n, torch.float32, torch.tensor([t]), size=8)
    condition = condition.rows(torch.zeros(n, dtype=torch.long))
    reference = make_pipeline(seed=1).unet.requires_grad_(False) if method == "RLHF" else None
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(25)
    literal = naive.Branches(condition, x_0, eps, t)
    walked = naive.walk(unet, pipeline.vae, scheduler, brightness, literal, m, reference)
    expected = naive.sft_loss(walked) if method == "SFT" else naive.rlhf_loss(walked, BETA)
    expected.backward()
    expected_gradient = gradient(unet)
    unet.zero_grad()

    def judge(latents, rows):
        images = sdxl.decode_latents(pipeline.vae, latents, 4)
        return lambda: (brightness(images), {})

    schedule = Schedule.from_config(pipeline.scheduler.config, 25)
    regression, branches = Regression(schedule), Branches.begin(schedule, x_0, eps, start)
    scores, path = score_branches(denoiser(unet, condition).rows, judge, schedule, branches, m, batch_size=2)
    selection = select(scores.rewards, scores.active, n)
    torch.testing.assert_close(selection.branch_reward[0], walked.rewards, rtol=0, atol=1e-5)
    best_and_worst = torch.cat([selection.best_rows, selection.worst_rows])
    rows = selection.best_rows if method == "SFT" else best_and_worst
    chosen, path, of_chosen = branches.rows(rows), path.rows(rows), condition.rows(rows)
    output = outputs_through_sampler(denoiser(unet, of_chosen).rows(slice(None)), schedule, chosen, m)
    errors = regression.errors(chosen, path, output)
    if method == "SFT":
        loss = objective = (sft_weights(path.active, torch.ones(1, dtype=torch.bool)) * errors).sum()
    else:
        with torch.no_grad():
            theirs = regression.errors(chosen, path, sdxl.predict_along(reference, path, of_chosen))
        of_pair = (part[None] for part in (errors.detach(), theirs, path.active))
        preference = preference_loss(ARGS, *of_pair, selection.branch_reward[:, rows], torch.tensor([True]))
        loss, objective = preference.loss, (preference.weights[0] * errors).sum()
    objective.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(gradient(unet), expected_gradient, rtol=1e-3, atol=1e-5 * expected_gradient.abs().max())
