"""Validation: draw the validation prompts with the current weights, score them, log both."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from sharpening import sdxl
from sharpening.rewards.calling import Reward, RewardError
from sharpening.running.tracking import log_images
from sharpening.trajectory import Schedule, generate


@contextmanager
def averaged_weights(unet: UNet2DConditionModel, ema: EMAModel | None) -> Iterator[None]:
    """The EMA weights inside, the training weights again outside, whatever happens."""
    if ema is None:
        yield
        return
    parameters = sdxl.trainable_parameters(unet)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


class Validation:
    """Prompts embedded once, so that the text encoders can be freed before training starts."""

    def __init__(self, args: Namespace, encoders: sdxl.TextEncoders, unconditional: sdxl.Unconditional):
        prompts = [args.validation_prompt] if args.validation_prompt else []
        if args.validation_prompts_file:
            lines = Path(args.validation_prompts_file).read_text().splitlines()
            prompts = [line.strip() for line in lines if line.strip()]
        self.args = args
        self.unconditional = unconditional
        self.prompts = [prompt for prompt in prompts for _ in range(args.num_validation_images)]
        self.embeddings = {prompt: encoders.encode([prompt]) for prompt in dict.fromkeys(prompts)}

    def step(
        self,
        accelerator: Accelerator,
        step: int,
        steps_per_epoch: int,
        metrics: dict[str, float],
        *models: Any,
    ) -> str:
        """Validate on the main process if it is time, by `run(*models)`; add to the metrics and log the images.

        Returns:
            Why it failed, or nothing.
        """
        if not (accelerator.is_main_process and self.due(step, steps_per_epoch)):
            return ""
        try:
            drawn, validated = self.run(*models)
        except RewardError as error:
            return f"validation at step {step}: {error}"
        metrics.update(validated)
        log_images(accelerator, Path(self.args.output_dir), {"validation/images": drawn}, step)
        return ""

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether step (from 1) ends a multiple of `--validation_steps` steps or of `--validation_epochs` epochs."""
        every = self.args.validation_steps, self.args.validation_epochs * steps_per_epoch
        return bool(self.prompts) and any(interval and step % interval == 0 for interval in every)

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

        The noise is the same at every call, so that images of different steps can be compared.

        Raises:
            RewardError: an image could not be scored.
        """
        args, images, rewards = self.args, [], []
        noise_source = torch.Generator().manual_seed(args.seed)
        unet.eval()
        with averaged_weights(unet, ema):
            starts = range(0, len(self.prompts), args.score_batch_size)
            for start in tqdm(starts, desc="validation", leave=False):
                prompts = self.prompts[start : start + args.score_batch_size]
                embeds, pooled = (torch.cat(part) for part in zip(*map(self.embeddings.get, prompts), strict=True))
                time_ids = sdxl.default_time_ids(len(prompts), args.resolution, embeds.device)
                condition = sdxl.Condition(embeds.float(), pooled.float(), time_ids)
                predict, guide = sdxl.branch_model(unet, condition, self.unconditional, args.validation_guidance_scale)
                noise = torch.randn(len(prompts), *sdxl.latent_shape(vae, args.resolution), generator=noise_source)
                latents = generate(predict, schedule, noise.to(embeds.device), guide)
                images.append(sdxl.decode_latents(vae, latents, args.decode_batch_size).cpu())
                rewards.append(reward.get_reward(images[-1], prompts))
        unet.train()
        scores = torch.cat(rewards)
        scores = scores[~scores.isnan()]  # none has one only with --reward_failure=skip
        metrics = {"validation/reward": float(scores.mean())} if len(scores) else {}
        if len(scores) > 1:
            metrics["validation/reward_standard_error"] = float(scores.std() / len(scores) ** 0.5)
        return torch.cat(images), metrics
