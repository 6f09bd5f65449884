"""Validation: draw the validation prompts with the current weights and score them, each rank its share."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from sharpening import sdxl
from sharpening.draws import draw_generator
from sharpening.progress import progress
from sharpening.rewards.calling import Reward
from sharpening.sharding import local
from sharpening.trajectory import Schedule, generate
from sharpening.transfer import Agree, alone
from sharpening.waiting import Begun


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
    for one, other in zip(map(local, some), map(local, others), strict=True):
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
        self, prompts: Sequence[str], drawing: Drawing, encoders: sdxl.TextEncoders, unconditional: sdxl.Unconditional,
        agree: Agree = alone,
    ):  # fmt: skip
        """agree: as of `Run.same_forwards`."""
        self.drawing, self.unconditional, self._agree = drawing, unconditional, agree
        self.prompts = [prompt for prompt in prompts for _ in range(drawing.images_per_prompt)]
        bar = progress(dict.fromkeys(prompts), desc="encoding validation prompts", unit="prompt", delay=1)
        self.embeddings = {prompt: encoders.encode([prompt]) for prompt in bar}

    @property
    def slices(self) -> list[range]:
        """The images of each forward. A rank draws whole slices, so that no image depends on the number of ranks."""
        indices, size = range(len(self.prompts)), self.drawing.batch_size
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    @torch.no_grad()
    def draw(
        self,
        accelerator: Accelerator,
        unet: UNet2DConditionModel,
        ema: EMAModel | None,
        vae: AutoencoderKL,
        schedule: Schedule,
        reward: Reward,
    ) -> list[tuple[Tensor, Tensor]]:
        """Images (b, 3, H, W) uint8 on the CPU and scores (b,) float32 of each slice of this rank: slice i is of rank
        i modulo their number. A score is NaN where the reward failed and was told to skip. All images are drawn even
        if one could not be scored: other ranks may need this one's part of the weights.

        Raises:
            RewardError: an image could not be scored.
        """
        drawing, drawn = self.drawing, []
        shape = sdxl.latent_shape(vae, drawing.resolution)
        own = self.slices[accelerator.process_index :: accelerator.num_processes]
        idle = self.slices[:1] * (self._agree(len(own)) - len(own))  # drawn for their forwards, and thrown away
        unet.eval()
        # One autocast, so that the weights are converted once.
        with averaged_weights(unet, ema), accelerator.autocast(), Begun() as judged:
            for indices in progress(own + idle, desc="validation", unit="slice", leave=False):
                prompts = [self.prompts[index] for index in indices]
                embeds, pooled = (torch.cat(part) for part in zip(*map(self.embeddings.get, prompts), strict=True))
                time_ids = sdxl.default_time_ids(len(prompts), drawing.resolution, embeds.device)
                condition = sdxl.Condition(embeds.float(), pooled.float(), time_ids)
                model = sdxl.branch_model(unet, condition, self.unconditional, drawing.guidance_scale)
                noise = [torch.randn(shape, generator=self._generator(index)) for index in indices]
                latents = generate(model, schedule, torch.stack(noise).to(embeds.device))
                if len(drawn) < len(own):
                    images = sdxl.decode_latents(vae, latents, drawing.decode_batch_size).cpu()
                    drawn.append((images * 255).round().to(torch.uint8))
                    judged.begin(partial(reward.begin, images, prompts))
        unet.train()
        return [(images, scores) for images, (scores, _) in zip(drawn, judged.wait(), strict=True)]

    def _generator(self, index: int) -> torch.Generator:
        """Of the noise of an image, whoever draws it."""
        return draw_generator(self.drawing.seed, index, "validation")

    def gather(self, accelerator: Accelerator, drawn: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The images of all ranks in order, (V, 3, H, W) in [0, 1] on the CPU of the main one and none on others, and
        their scores (V,), NaN where one has none; every rank must call it.

        drawn is what `draw` returned. One slice of each rank is exchanged at a time: the device holds no more.
        """
        ranks, size = accelerator.num_processes, len(self.slices[0])
        images, scores = [], []
        for first in range(0, len(self.slices), ranks):
            pixels = torch.zeros(size, 3, self.drawing.resolution, self.drawing.resolution, dtype=torch.uint8)
            rewards = torch.zeros(size)
            if first // ranks < len(drawn):
                own_images, own_scores = drawn[first // ranks]
                pixels[: len(own_images)], rewards[: len(own_scores)] = own_images, own_scores
            both = (accelerator.gather(part.to(accelerator.device)).cpu().split(size) for part in (pixels, rewards))
            for indices, some_images, some_scores in zip(self.slices[first : first + ranks], *both, strict=False):
                scores.append(some_scores[: len(indices)])
                if accelerator.is_main_process:
                    images.append(some_images[: len(indices)])
        return torch.cat(images) / 255 if images else torch.empty(0), torch.cat(scores)

    @staticmethod
    def metrics(scores: Tensor) -> dict[str, float]:
        """The mean of scores (V,) with its standard error, without those that are NaN."""
        scores = scores[~scores.isnan()]
        metrics = {"validation/reward": float(scores.mean())} if len(scores) else {}
        if len(scores) > 1:
            metrics["validation/reward_standard_error"] = float(scores.std() / len(scores) ** 0.5)
        return metrics
