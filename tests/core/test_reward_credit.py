"""Why `--reward_on trajectory` can credit the wrong branch: measured on the tiny SDXL, as `docs/method.md` says.

The loss pulls the model towards the latent that the better branch started from. Judging clean estimates along the
branch finds the better latent where little noise was added, and hardly better than a coin where much was.
"""

import pytest
import torch

from sharpening import sdxl
from sharpening.selection import begin_samples, score_branches
from sharpening.trajectory import Branches, generate
from tiny_world import shapes


@pytest.mark.slow
def test_estimates_along_a_branch_tell_the_better_latent_at_low_noise_only(tiny_sdxl):
    schedule, generator = tiny_sdxl.schedule, torch.Generator().manual_seed(0)
    prompts = [caption for caption in shapes.training_captions() * 2 for _ in range(2)]  # two latents for each
    model_of = tiny_sdxl.model_of(prompts)

    def judge(latents, rows):
        images = sdxl.decode_latents(tiny_sdxl.vae, latents, 96)
        return tiny_sdxl.reward.begin(images, [prompts[row] for row in rows])

    model = model_of(torch.arange(len(prompts)))
    with torch.no_grad():
        latents = generate(model, schedule, torch.randn(len(prompts), 4, 8, 8, generator=generator))
    samples = begin_samples(judge, latents, 96)().rewards.view(-1, 2)
    difference = samples[:, 0] - samples[:, 1]
    far = difference.abs() > 0.2
    assert far.sum() > 40
    agreement = {}
    for timestep in (100, 900):
        t = torch.full((len(prompts),), timestep)
        eps = torch.randn(len(prompts) // 2, 4, 8, 8, generator=generator).repeat_interleave(2, 0)
        scores, _ = score_branches(model_of, judge, schedule, Branches.begin(schedule, latents, eps, t), 1, 96)
        estimates = scores.rewards.view(-1, 2)
        agree = (estimates[:, 0] > estimates[:, 1]) == (difference > 0)
        agreement[timestep] = float(agree[far].float().mean())
    assert agreement[100] > 0.95
    assert agreement[900] < 0.75
