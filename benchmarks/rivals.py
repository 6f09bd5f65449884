"""What the scripts are measured against: the same step read literally, plain fine-tuning, and one step of a branch."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import mse_loss

from benchmarks import naive
from benchmarks.models import TINY_DECODER
from benchmarks.script import BETA, INFER_STEPS, LEARNING_RATE, Setting, brightness
from sharpening import sdxl
from sharpening.model_source import Source
from sharpening.running.optimization import make_adam

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def random_condition(unet: UNet2DConditionModel, rows: int, resolution: int) -> sdxl.Condition:
    """What a UNet takes beside latents, made up for images of `resolution` pixels."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    parts = [torch.randn(rows, 77, config.cross_attention_dim), torch.randn(rows, pooled)]
    time_ids = sdxl.default_time_ids(rows, resolution, unet.device)
    return sdxl.Condition(*(part.to(unet.device) for part in parts), time_ids)


class Rivals:
    """The same step by other means, on a UNet of their own; a batch is random, of the script's shapes."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        """`folder` holds the pipeline and the small decoder that `benchmarks.models.write_pipeline` wrote."""
        self.setting = setting
        self.device = torch.device(
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        )
        self.dtype = DTYPES[setting.mixed_precision]
        source = Source("pretrained_model_name_or_path", str(folder))
        adapter = sdxl.lora_config(16, None) if setting.use_lora else None
        self.unet = sdxl.load_unet(source, self.device, self.dtype, adapter)
        if setting.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.reference = None
        if setting.method == "rlhf":
            self.reference = sdxl.load_frozen_unet(source, self.device, self.dtype)
        vae = sdxl.load_decoder(source, "vae", self.device, torch.float32)
        self.vae = vae.to(memory_format=torch.contiguous_format)  # as a library loads it
        small = Source("reward_vae", str(folder / TINY_DECODER))
        decoder = (small, None) if setting.decoder == "tiny" else (source, "vae")
        self.decoder = sdxl.load_decoder(*decoder, self.device, self.dtype)
        self.parameters = sdxl.trainable_parameters(self.unet)
        self.optimizer = make_adam(self.parameters, setting.use_8bit_adam, scaled=False, lr=LEARNING_RATE)
        self.scheduler = DDIMScheduler.from_config(source.read_json("scheduler/scheduler_config.json"))
        self.scheduler.set_timesteps(INFER_STEPS)
        self.shape = sdxl.latent_shape(self.vae, setting.resolution)
        self.generator = torch.Generator().manual_seed(0)

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
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
        finally:  # a backward that ran out of memory leaves gradients to the other rivals
            self.optimizer.zero_grad()

    def _condition(self, rows: int) -> sdxl.Condition:
        return random_condition(self.unet, rows, self.setting.resolution)

    def _noise(self, rows: int) -> Tensor:
        return torch.randn(rows, *self.shape, generator=self.generator).to(self.device)

    def _timestep(self) -> int:
        return int(torch.randint(self.setting.first_timestep, 1000, (1,), generator=self.generator))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
