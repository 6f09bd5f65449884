"""The algorithms read literally, to measure the scripts against: every branch keeps its graph.

All branches walk with gradient through the sampler, clean estimates are decoded in float32 with a graph, the reference
sees every branch, and one backward goes through all of it. One prompt at a time: diffusers' sampler has one timestep.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss

from sharpening.sdxl import Condition

Score = Callable[[Tensor], Tensor]  # images (n, 3, H, W) in [0, 1] -> rewards (n,)


def forward(unet: UNet2DConditionModel, x: Tensor, t: int, condition: Condition) -> Tensor:
    """The UNet's output for rows of one prompt."""
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    return unet(x, t, encoder_hidden_states=condition.embeds, added_cond_kwargs=added).sample.float()


def walk(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL | AutoencoderTiny,
    scheduler: DDIMScheduler,
    score: Score,
    condition: Condition,
    x_0: Tensor,
    eps: Tensor,
    t: int,
    steps: int,
    reference: UNet2DConditionModel | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, errors and the reference's errors of n branches, each a mean over the steps, (n,)."""
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
    mean = [torch.stack(part).mean(0) if part else torch.zeros(0) for part in (rewards, errors, reference_errors)]
    return mean[0], mean[1], mean[2]


def sft_loss(rewards: Tensor, errors: Tensor) -> Tensor:
    """Equation 9: the error of the branch with the best reward."""
    return errors[rewards.argmax()]


def rlhf_loss(rewards: Tensor, errors: Tensor, reference_errors: Tensor, beta: float) -> Tensor:
    """Equation 11 on the best and the worst branch."""
    best, worst = rewards.argmax(), rewards.argmin()
    log_ratios = reference_errors - errors
    return -logsigmoid(beta * (log_ratios[best] - log_ratios[worst]) - (rewards[best] - rewards[worst]))


@torch.no_grad()
def generate(unet: UNet2DConditionModel, scheduler: DDIMScheduler, noise: Tensor, condition: Condition) -> Tensor:
    """Clean latents (n, 4, h, w) of noise by DDIM, without guidance."""
    x = noise
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(forward(unet, x, t, condition), t, x).prev_sample
    return x
