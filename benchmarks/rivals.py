"""What the scripts are measured against: the same step read literally, plain fine-tuning, and one step of a branch."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

from benchmarks import naive
from benchmarks.models import TINY_DECODER
from benchmarks.script import BETA, INFER_STEPS, LEARNING_RATE, Setting, brightness
from sharpening import sdxl
from sharpening.model_source import Source
from sharpening.running.optimization import make_adam

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PARTS = {  # what each rival needs
    "naive": ("unet", "optimizer", "reference", "vae"),
    "plain": ("unet", "optimizer"),
    "branch_step": ("unet", "decoder"),
}


def random_condition(unet: UNet2DConditionModel, rows: int, resolution: int) -> sdxl.Condition:
    """What a UNet takes beside latents, made up for images of `resolution` pixels."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    parts = [torch.randn(rows, 77, config.cross_attention_dim), torch.randn(rows, pooled)]
    time_ids = sdxl.default_time_ids(rows, resolution, unet.device)
    return sdxl.Condition(*(part.to(unet.device) for part in parts), time_ids)


class Rivals:
    """The same step by other means, on a UNet of their own; a batch is random, of the script's shapes.

    What a rival needs is made when it is first used, so whether there is memory for it shows in its own first step.
    """

    def __init__(self, setting: Setting, folder: Path) -> None:
        """`folder` holds the pipeline and the small decoder that `benchmarks.models.write_pipeline` wrote."""
        self.setting, self._folder = setting, folder
        self.device = torch.device(
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        )
        self.dtype = DTYPES[setting.mixed_precision]
        self._source = Source("pretrained_model_name_or_path", str(folder))
        self.scheduler = DDIMScheduler.from_config(self._source.read_json("scheduler/scheduler_config.json"))
        self.scheduler.set_timesteps(INFER_STEPS)
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(self._source.read_json("vae/config.json"))
        self.shape = sdxl.latent_shape(vae, setting.resolution)
        self.generator = torch.Generator().manual_seed(0)

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        """The UNet that trains, of all rivals."""
        adapter = sdxl.lora_config(16, None) if self.setting.use_lora else None
        unet = sdxl.load_unet(self._source, self.device, self.dtype, adapter)
        if self.setting.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return unet

    @cached_property
    def optimizer(self) -> Optimizer:
        """Of the weights that train."""
        parameters = sdxl.trainable_parameters(self.unet)
        return make_adam(parameters, self.setting.use_8bit_adam, scaled=False, lr=LEARNING_RATE)

    @cached_property
    def reference(self) -> UNet2DConditionModel | None:
        """What RLHF compares with."""
        if self.setting.method != "rlhf":
            return None
        return sdxl.load_frozen_unet(self._source, self.device, self.dtype)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """What the literal reading decodes with, as a library loads it."""
        vae = sdxl.load_decoder(self._source, "vae", self.device, torch.float32)
        return vae.to(memory_format=torch.contiguous_format)

    @cached_property
    def decoder(self) -> AutoencoderKL | AutoencoderTiny:
        """What the script decodes with."""
        small = Source("reward_vae", str(self._folder / TINY_DECODER))
        decoder = (small, None) if self.setting.decoder == "tiny" else (self._source, "vae")
        return sdxl.load_decoder(*decoder, self.device, self.dtype)

    def keep(self, names: Collection[str]) -> None:
        """Let go what none of the named rivals needs."""
        needed = {part for name in names for part in PARTS[name]}
        for part in {part for parts in PARTS.values() for part in parts} - needed:
            self.__dict__.pop(part, None)

    def naive(self) -> None:
        """The algorithm read literally; RLHF generates a latent for each branch, as the released code does."""
        setting, total = self.setting, 0.0
        for _ in range(setting.batch):
            n = setting.num_noisy_latents
            condition = self._condition(1).rows(torch.zeros(n, dtype=torch.long))
            x_0 = self._noise(1).expand(n, -1, -1, -1)
            if setting.method == "rlhf":
                # In a context of its own: autocast would reuse the weights that it casts here, without a gradient.
                with self._autocast():
                    x_0 = naive.generate(self.unet, self.scheduler, self._noise(n), condition)
            with self._autocast():
                branches = naive.Branches(condition, x_0, self._noise(n), self._timestep())
                walked = naive.walk(
                    self.unet, self.vae, self.scheduler, brightness, branches, setting.trajectory_nums, self.reference
                )
                loss = naive.sft_loss(walked) if setting.method == "sft" else naive.rlhf_loss(walked, BETA)
            total = total + loss / setting.batch
        self._update(total)

    def plain(self) -> None:
        """Standard fine-tuning as diffusers' own script does it: one noise, one forward, one backward."""
        rows = self.setting.batch
        with self._autocast():
            eps = self._noise(rows)
            t = torch.randint(0, 1000, (rows,), generator=self.generator).to(self.device)
            x_t = self.scheduler.add_noise(self._noise(rows), eps, t)
            loss = mse_loss(naive.forward(self.unet, x_t, t, self._condition(rows)), eps)
        self._update(loss)

    def branch_step(self) -> None:
        """What a step of one branch cannot do without."""
        brightness(sdxl.decode_latents(self.decoder, self.forward(), 1))

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The UNet's output (1, 4, h, w), without gradient."""
        with self._autocast():
            return naive.forward(self.unet, self._noise(1), self._timestep(), self._condition(1))

    def _update(self, loss: Tensor) -> None:
        try:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(sdxl.trainable_parameters(self.unet), 1.0)
            self.optimizer.step()
        finally:  # a backward that ran out of memory leaves gradients to the other rivals
            self.unet.zero_grad()

    def _condition(self, rows: int) -> sdxl.Condition:
        return random_condition(self.unet, rows, self.setting.resolution)

    def _noise(self, rows: int) -> Tensor:
        return torch.randn(rows, *self.shape, generator=self.generator).to(self.device)

    def _timestep(self) -> int:
        return int(torch.randint(self.setting.first_timestep, 1000, (1,), generator=self.generator))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
