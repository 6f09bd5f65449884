"""Validation: draw the validation prompts with the current weights, score them, log both."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from sharpening import sdxl
from sharpening.rewards.calling import Reward
from sharpening.trajectory import Schedule, generate


@contextmanager
def averaged_weights(unet: UNet2DConditionModel, ema: EMAModel | None) -> Iterator[None]:
    """The EMA weights inside, the training weights again outside, whatever happens; inside, they are in `ema`."""
    if ema is None:
        yield
        return
    parameters = sdxl.trainable_parameters(unet)
    _exchange(parameters, ema.shadow_params)
    try:
        yield
    finally:
        _exchange(parameters, ema.shadow_params)


@torch.no_grad()
def _exchange(some: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """Exchange the values of tensors, one pair at a time, so that no more than a copy of the largest is held.

    The tensors stay where they are: an optimizer, a wrapper or a compiled forward may hold on to their memory.
    """
    for one, other in zip(some, others, strict=True):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


def read_validation_prompts(prompt: str | None, file: str | None) -> list[str]:
    """The one prompt, or the lines of the file that are not empty, or none."""
    if file is None:
        return [prompt] if prompt else []
    return [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]


@dataclass(frozen=True)
class Drawing:
    """How validation images are drawn.

    Attributes:
        images_per_prompt: each from noise of its own, the same noise at every validation.
        resolution: in pixels.
        guidance_scale: 1 is without guidance.
        batch_size: images per forward; decode_batch_size: latents per decode.
        seed: of the noise.
    """

    images_per_prompt: int
    resolution: int
    guidance_scale: float
    batch_size: int
    decode_batch_size: int
    seed: int


class Validation:
    """Prompts embedded once, so that the text encoders can be freed before training starts."""

    def __init__(
        self, prompts: Sequence[str], drawing: Drawing, encoders: sdxl.TextEncoders, unconditional: sdxl.Unconditional
    ):
        self.drawing, self.unconditional = drawing, unconditional
        self.prompts = [prompt for prompt in prompts for _ in range(drawing.images_per_prompt)]
        self.embeddings = {prompt: encoders.encode([prompt]) for prompt in dict.fromkeys(prompts)}

    @torch.no_grad()
    def run(
        self,
        unet: UNet2DConditionModel,
        ema: EMAModel | None,
        vae: AutoencoderKL,
        schedule: Schedule,
        reward: Reward,
    ) -> tuple[Tensor, dict[str, float]]:
        """Images (V, 3, H, W) in [0, 1] of all prompts, and the mean reward with its standard error of those scored.

        Raises:
            RewardError: an image could not be scored.
        """
        drawing, images, rewards = self.drawing, [], []
        noise_source = torch.Generator().manual_seed(drawing.seed)
        shape = sdxl.latent_shape(vae, drawing.resolution)
        unet.eval()
        with averaged_weights(unet, ema):
            starts = range(0, len(self.prompts), drawing.batch_size)
            for start in tqdm(starts, desc="validation", leave=False):
                prompts = self.prompts[start : start + drawing.batch_size]
                embeds, pooled = (torch.cat(part) for part in zip(*map(self.embeddings.get, prompts), strict=True))
                time_ids = sdxl.default_time_ids(len(prompts), drawing.resolution, embeds.device)
                condition = sdxl.Condition(embeds.float(), pooled.float(), time_ids)
                model = sdxl.branch_model(unet, condition, self.unconditional, drawing.guidance_scale)
                noise = torch.randn(len(prompts), *shape, generator=noise_source)
                latents = generate(model, schedule, noise.to(embeds.device))
                images.append(sdxl.decode_latents(vae, latents, drawing.decode_batch_size).cpu())
                rewards.append(reward.get_reward(images[-1], prompts))
        unet.train()
        scores = torch.cat(rewards)
        scores = scores[~scores.isnan()]  # none has one only with --reward_failure=skip
        metrics = {"validation/reward": float(scores.mean())} if len(scores) else {}
        if len(scores) > 1:
            metrics["validation/reward_standard_error"] = float(scores.std() / len(scores) ** 0.5)
        return torch.cat(images), metrics
