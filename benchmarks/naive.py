"""The algorithms read literally, to measure the scripts against: every branch keeps its graph.

All branches walk with gradient through the sampler, clean estimates are decoded in float32 with a graph, the reference
sees every branch, and one backward goes through all of it. One prompt at a time: diffusers' sampler has one timestep.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss

from sharpening.sdxl import Condition

Score = Callable[[Tensor], Tensor]  # images (n, 3, H, W) in [0, 1] -> rewards (n,)


class Branches(NamedTuple):
    """The n branches of a prompt where they begin."""

    condition: Condition  # of n rows
    x_0: Tensor  # (n, 4, h, w) clean latents
    eps: Tensor  # (n, 4, h, w) noise
    t: int  # first timestep


class Walked(NamedTuple):
    """What n branches have earned and erred, each a mean over their steps."""

    rewards: Tensor  # (n,)
    errors: Tensor  # (n,)
    reference_errors: Tensor | None  # (n,)


def forward(unet: UNet2DConditionModel, x: Tensor, t: int | Tensor, condition: Condition) -> Tensor:
    """The UNet's output (R, 4, h, w) float32 for rows x (R, 4, h, w), at one t or at their own t (R,)."""
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    return unet(x, t, encoder_hidden_states=condition.embeds, added_cond_kwargs=added).sample.float()


def walk(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL | AutoencoderTiny,
    scheduler: DDIMScheduler,
    score: Score,
    branches: Branches,
    steps: int,
    reference: UNet2DConditionModel | None = None,
) -> Walked:
    """Walk, decode, judge and compare all branches with their graphs, until they have ended or gone `steps` steps."""
    condition, x_0, eps, t = branches
    x = scheduler.add_noise(x_0, eps, torch.tensor([t], device=x_0.device))
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    rewards, errors, reference_errors = [], [], []
    for _ in range(steps):
        if t < 0:
            break
        output = forward(unet, x, t, condition)
        moved = scheduler.step(output, t, x)
        with torch.autocast(x.device.type, enabled=False):
            decoded = vae.decode(moved.pred_original_sample / vae.config.scaling_factor).sample
        rewards.append(score((decoded.detach() / 2 + 0.5).clamp(0, 1)))
        errors.append(mse_loss(output, eps, reduction="none").mean((1, 2, 3)))
        if reference is not None:
            with torch.no_grad():
                theirs = forward(reference, x, t, condition)
            reference_errors.append(mse_loss(theirs, eps, reduction="none").mean((1, 2, 3)))
        x, t = moved.prev_sample, t - stride
    return Walked(*(torch.stack(part).mean(0) if part else None for part in (rewards, errors, reference_errors)))


def sft_loss(walked: Walked) -> Tensor:
    """Equation 9: the error of the branch with the best reward."""
    return walked.errors[walked.rewards.argmax()]


def rlhf_loss(walked: Walked, beta: float) -> Tensor:
    """Equation 11 on the best and the worst branch."""
    rewards, log_ratios = walked.rewards, walked.reference_errors - walked.errors
    best, worst = rewards.argmax(), rewards.argmin()
    return -logsigmoid(beta * (log_ratios[best] - log_ratios[worst]) - (rewards[best] - rewards[worst]))


@torch.no_grad()
def generate(unet: UNet2DConditionModel, scheduler: DDIMScheduler, noise: Tensor, condition: Condition) -> Tensor:
    """Clean latents (n, 4, h, w) of noise by DDIM, without guidance."""
    x = noise
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(forward(unet, x, t, condition), t, x).prev_sample
    return x
