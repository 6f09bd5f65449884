"""The models of a run, as its flags name them, loaded where they run."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

from sharpening import sdxl, sharding
from sharpening.model_source import Source, text_identity
from sharpening.reference import Reference
from sharpening.running.plan import Plan

ATTENTION = ("enable_xformers_memory_efficient_attention", "enable_npu_flash_attention")  # flags, methods of diffusers


class Models:
    """What a run loads. Every process loads every model."""

    def __init__(self, plan: Plan, watch: Callable[[UNet2DConditionModel], None]) -> None:
        """`watch` is shown each UNet once."""
        self.plan, self.args, self.device, self._watch = plan, plan.args, plan.device, watch

    @cached_property
    def _vae_source(self) -> tuple[Source, str | None]:
        """The source of the training VAE and the subfolder it lies in."""
        name = self.args.pretrained_vae_model_name_or_path
        if name is None:
            return self.plan.source, "vae"
        return Source("pretrained_vae_model_name_or_path", name, cache_dir=self.args.cache_dir), None

    def decoders(self) -> tuple[AutoencoderKL, AutoencoderKL | AutoencoderTiny]:
        """The training VAE, and what decodes for the reward: `--reward_vae`, or the VAE itself."""
        vae = sdxl.load_decoder(*self._vae_source, self.device, self.plan.weight_dtype)
        if not self.args.reward_vae:
            return vae, vae
        source = Source("reward_vae", self.args.reward_vae, cache_dir=self.args.cache_dir)
        return vae, sdxl.load_decoder(source, None, self.device, self.plan.weight_dtype)

    def unet(self) -> UNet2DConditionModel:
        """The UNet that trains, with the memory flags applied."""
        args = self.args
        lora = sdxl.lora_config(args.lora_rank, args.lora_alpha) if args.use_lora else None
        unet = sdxl.load_unet(self.plan.source, self._loaded_on, self.plan.weight_dtype, lora)
        if args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return self._as_it_runs(unet)

    def reference(self, unet: UNet2DConditionModel) -> Reference:
        """The UNet as it is before training; with LoRA that needs no copy of it."""
        if self.args.use_lora:
            return Reference(unet, None)
        frozen = sdxl.load_frozen_unet(self.plan.source, self._loaded_on, self.plan.weight_dtype)
        return Reference(unet, self._as_it_runs(frozen))

    @property
    def _loaded_on(self) -> torch.device:
        """Where a UNet is before `_as_it_runs`: the device need not have room for one that lies in parts."""
        return torch.device("cpu") if self.args.fsdp else self.device

    def _as_it_runs(self, unet: UNet2DConditionModel) -> UNet2DConditionModel:
        """With the attention that the flags name and, with `--fsdp`, in parts on all processes."""
        attention = [name for name in ATTENTION if getattr(self.args, name)]
        sdxl.switch_attention(unet, attention, self.device, self.plan.weight_dtype)
        self._watch(unet)
        return sharding.shard(unet, self.device, self.plan.weight_dtype) if self.args.fsdp else unet

    def text_encoders(self) -> tuple[sdxl.TextEncoders, sdxl.Unconditional]:
        """The text encoders and what stands for no prompt."""
        encoders = sdxl.TextEncoders.load(self.plan.source, self.device, self.plan.weight_dtype)
        return encoders, sdxl.unconditional_embedding(self.plan.source, encoders)

    def identity(self, images: bool) -> dict[str, Any]:
        """What cached embeddings, and latents of images, were made by."""
        source, subfolder = self._vae_source
        return {"text": text_identity(self.plan.source)} | (
            {"vae": source.identity(subfolder or ".")} if images else {}
        )
