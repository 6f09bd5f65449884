"""Stable Diffusion XL as the scripts use it: load, encode, predict, decode, save."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import NamedTuple

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sharpening.errors import UserError, first_line
from sharpening.model_source import LORA_LAYERS, Source
from sharpening.trajectory import Model, Path, classifier_free_guidance
from sharpening.transfer import Index, slices, take, upload


def hide_library_bars() -> None:
    """No bars of diffusers and transformers while they load: `Source.load` says what is loaded."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()


@dataclass
class TextEncoders:
    """SDXL's two CLIP text encoders with their tokenizers."""

    tokenizers: list[CLIPTokenizer]
    models: list[nn.Module]

    @classmethod
    def load(cls, source: Source, device: torch.device, dtype: torch.dtype) -> "TextEncoders":
        tokenizers = [source.load(CLIPTokenizer, name) for name in ("tokenizer", "tokenizer_2")]
        models = [
            source.load(CLIPTextModel, "text_encoder", dtype=dtype),
            source.load(CLIPTextModelWithProjection, "text_encoder_2", dtype=dtype),
        ]
        for model in models:
            model.requires_grad_(False).eval().to(device)
        return cls(tokenizers, models)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompt embeddings (B, 77, D) and pooled embeddings (B, P), equal to the diffusers pipeline's own."""
        hidden = []
        for tokenizer, model in zip(self.tokenizers, self.models, strict=True):
            tokens = tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            output = model(tokens.input_ids.to(model.device), output_hidden_states=True)
            # SDXL conditions on the penultimate layer of both encoders, and on the second one's projection.
            hidden.append(output.hidden_states[-2])
        return torch.cat(hidden, dim=-1), output[0]


class Condition(NamedTuple):
    """What the UNet is conditioned on, for R rows."""

    embeds: Tensor  # (R, 77, D)
    pooled: Tensor  # (R, P)
    time_ids: Tensor  # (R, 6): original height, width, crop top, left, target height, width, in pixels

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], device: torch.device) -> "Condition":
        """The condition of a collated batch of `sharpening.data.encoding_cache.CachedData`."""
        names = ("prompt_embeds", "pooled_prompt_embeds", "time_ids")
        return cls(*(upload(batch[name], device).float() for name in names))

    def rows(self, index: Index) -> "Condition":
        """The rows that `index`, on the CPU, names."""
        return Condition(*take(self, index))

    def repeat(self, count: int) -> "Condition":
        """Every row `count` times, one after the other."""
        return self if count == 1 else Condition(*(part.repeat_interleave(count, 0) for part in self))

    def without_prompt(self, unconditional: "Unconditional", dropped: Tensor | None = None) -> "Condition":
        """The same rows with no prompt; where `dropped` (R,) bool on the CPU is given, only the rows it marks."""
        if dropped is None:
            embeds, pooled = (nothing.expand_as(part) for nothing, part in zip(unconditional, self, strict=False))
            return Condition(embeds, pooled, self.time_ids)
        if not dropped.any():
            return self
        dropped = upload(dropped, self.pooled.device)
        return Condition(
            torch.where(dropped[:, None, None], unconditional.embeds, self.embeds),
            torch.where(dropped[:, None], unconditional.pooled, self.pooled),
            self.time_ids,
        )


class Unconditional(NamedTuple):
    """The embedding that stands for "no prompt": embeds (1, 77, D) and pooled (1, P), float32."""

    embeds: Tensor
    pooled: Tensor


def unconditional_embedding(source: Source, encoders: TextEncoders) -> Unconditional:
    """What the pipeline uses as "no prompt" in classifier-free guidance.

    SDXL base zeroes it (`force_zeros_for_empty_prompt`); other models encode the empty string. Dropped prompts and
    guided branches must use the one that sampling will use.
    """
    embeds, pooled = (part.float() for part in encoders.encode([""]))
    if source.read_json("model_index.json").get("force_zeros_for_empty_prompt", True):
        embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    return Unconditional(embeds, pooled)


def load_decoder(
    source: Source, subfolder: str | None, device: torch.device, dtype: torch.dtype
) -> AutoencoderKL | AutoencoderTiny:
    """A VAE or TAESD, frozen; in float32 where its config says that float16 overflows (`force_upcast`)."""
    config = source.read_json(f"{subfolder}/config.json" if subfolder else "config.json")
    tiny = config.get("_class_name") == "AutoencoderTiny"
    # Decided before loading: weights that passed through float16 would stay rounded to it.
    if dtype == torch.float16 and config.get("force_upcast", not tiny):
        dtype = torch.float32
    model = source.load(AutoencoderTiny if tiny else AutoencoderKL, subfolder, dtype=dtype)
    return channels_last(model.requires_grad_(False).eval().to(device))


def channels_last(model: nn.Module) -> nn.Module:
    """A model with its channels last in memory, in which convolutions are faster (`docs/performance.md`)."""
    return model.to(memory_format=torch.channels_last)


def load_unet(
    source: Source, device: torch.device, dtype: torch.dtype, lora: LoraConfig | None = None
) -> UNet2DConditionModel:
    """The trainable UNet, whose forward mixed precision autocasts.

    Full fine-tuning keeps float32 master weights. With an adapter the base is frozen in `dtype` and only the float32
    adapter trains; it begins as the identity.
    """
    unet = source.load(UNet2DConditionModel, "unet", dtype=torch.float32 if lora is None else dtype)
    unet = unet.to(device).train()
    if lora is not None:
        unet.requires_grad_(False)
        unet.add_adapter(lora)
        cast_training_params(unet, torch.float32)
    return unet


def load_frozen_unet(source: Source, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """A copy of the UNet that never trains, in `dtype`: the reference of full fine-tuning. Call it under autocast."""
    unet = source.load(UNet2DConditionModel, "unet", dtype=torch.float32).requires_grad_(False).eval()
    for module in unet.modules():
        # Autocast computes norms in float32 from float32 weights: rounded, they would set the reference apart from
        # the model that it is a copy of.
        if not isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return unet.to(device)


def switch_attention(
    unet: UNet2DConditionModel, methods: Sequence[str], device: torch.device, dtype: torch.dtype
) -> None:
    """Switch on attention implementations of diffusers by the names of their methods, which are those of the flags.

    Each is tried at once on `device`, forward and backward, with activations in `dtype`: whether there is a kernel for
    this card, this dtype and this size of head shows only when one is asked for.

    Raises:
        UserError: one cannot run here.
    """
    for method in methods:
        try:
            getattr(unet, method)()
            _try_attention(unet, device, dtype)
        except Exception as error:
            raise UserError(
                f"--{method} does not work here ({first_line(error)}); switch it off with --no-{method}, "
                "PyTorch's own attention is used then"
            ) from error


def _try_attention(unet: UNet2DConditionModel, device: torch.device, dtype: torch.dtype) -> None:
    """Raise what the UNet's first attention raises for 8 tokens; leaves no gradient and draws no random number."""
    attention = copy.deepcopy(next(module for module in unet.modules() if isinstance(module, Attention))).to(device)
    states = torch.zeros(1, 8, attention.to_q.in_features, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = attention(states)
    torch.autograd.grad(output.float().sum(), states)


def lora_config(rank: int, alpha: float | None) -> LoraConfig:
    """The adapter of `--use_lora`, on every attention's projections, where diffusers' SDXL LoRA trainer puts it."""
    return LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(LORA_LAYERS))


def trainable_parameters(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """What the optimizer moves: all weights, or those of the adapter."""
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def save_lora(unet: UNet2DConditionModel, folder: str | FilePath) -> None:
    """Write the adapter so that `pipe.load_lora_weights(folder)` applies it, with the scale of its `--lora_alpha`."""
    # Without the metadata the alpha would be read back as equal to the rank.
    metadata = unet.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet), unet_lora_adapter_metadata=metadata
    )


def load_lora(unet: UNet2DConditionModel, folder: str | FilePath) -> None:
    """Put the adapter that `save_lora` wrote into a UNet that has one of the same shape.

    Raises:
        UserError: the folder holds no adapter, or one of another shape.
    """
    try:
        state, _ = StableDiffusionXLPipeline.lora_state_dict(folder)
        saved = {name.removeprefix("unet."): value for name, value in state.items()}
        missing = set(get_peft_model_state_dict(unet)) ^ set(saved)
        if missing:
            raise ValueError(f"it differs in {min(missing)}")
        set_peft_model_state_dict(unet, saved)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--use_lora: {folder} holds no adapter that fits ({first_line(error)}); continue with the flags that "
            "the checkpoint was written with"
        ) from error


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Scaled latents (B, 4, h, w) float32 of pixels (B, 3, H, W) in [-1, 1].

    The posterior's mode, not a sample: SDXL's posterior is narrow, and a cache must not depend on when it was made.
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return posterior.mode().float() * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor, batch_size: int) -> Tensor:
    """Images (B, 3, H, W) float32 in [0, 1] of scaled latents (B, 4, h, w), `batch_size` at a time."""
    images = []
    # The decoder's dtype was chosen by load_decoder; an outer autocast would override it and overflow in float16.
    with torch.autocast(latents.device.type, enabled=False):
        for part in latents.split(batch_size):
            decoded = vae.decode(part.to(vae.dtype) / vae.config.scaling_factor).sample
            images.append((decoded.float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(images)


def predict_output(unet: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The UNet's output (R, 4, h, w) in the dtype of x, for rows with their own t (R,) and condition."""
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    output = unet(x, t, encoder_hidden_states=condition.embeds, added_cond_kwargs=added, return_dict=False)[0]
    return output.to(x.dtype)


def predict_guided(
    unet: nn.Module, x: Tensor, t: Tensor, condition: Condition, unconditional: Unconditional, guidance_scale: float
) -> Tensor:
    """The output (R, 4, h, w) under classifier-free guidance (1: without), its gradient through both of its parts."""
    if guidance_scale == 1:
        return predict_output(unet, x, t, condition)
    both = Condition(*map(torch.cat, zip(condition, condition.without_prompt(unconditional), strict=True)))
    conditional, without = predict_output(unet, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return without + guidance_scale * (conditional - without)


def predict_along(unet: nn.Module, path: Path, condition: Condition, batch_size: int | None = None) -> Tensor:
    """The UNet's output (R, m, 4, h, w) on all states of R branches, condition of R rows; `batch_size` states at a
    time, or all at once."""
    x, t, condition = path.x.flatten(0, 1), path.t.flatten(), condition.repeat(path.t.shape[1])
    parts = slices(len(x), batch_size or len(x))
    output = [predict_output(unet, x[rows], t[rows], condition.rows(rows)) for rows in parts]
    return torch.cat(output).unflatten(0, path.t.shape)


@dataclass(frozen=True)
class Denoiser:
    """A UNet with the condition of R rows, and the guidance that a walk of them follows (1: none)."""

    unet: nn.Module
    condition: Condition
    unconditional: Unconditional
    guidance_scale: float

    def rows(self, index: Index) -> Model:
        """The model of the rows that `index`, on the CPU, names."""
        return branch_model(self.unet, self.condition.rows(index), self.unconditional, self.guidance_scale)


def branch_model(unet: nn.Module, condition: Condition, unconditional: Unconditional, guidance_scale: float) -> Model:
    """What `walk` and `generate` take: the conditional output, and the guidance on top of it."""
    if guidance_scale == 1:
        return Model(partial(predict_output, unet, condition=condition))
    both = GuidedUNet(unet, condition, condition.without_prompt(unconditional))
    return Model(both.predict, classifier_free_guidance(both.predict_unconditional, guidance_scale))


class GuidedUNet:
    """A UNet asked for its output with a condition, and then without one for the same rows.

    Where no gradient is kept both come from one forward of twice the rows, which costs less than two.
    """

    def __init__(self, unet: nn.Module, condition: Condition, unconditional: Condition) -> None:
        self.unet, self.condition, self.unconditional = unet, condition, unconditional
        self._both = Condition(*map(torch.cat, zip(condition, unconditional, strict=True)))
        self._ahead: Tensor | None = None  # the unconditional output for the rows of the last `predict`

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The conditional output (R, 4, h, w) for x (R, 4, h, w) at t (R,)."""
        if torch.is_grad_enabled():
            self._ahead = None
            return predict_output(self.unet, x, t, self.condition)
        output, self._ahead = predict_output(self.unet, torch.cat([x, x]), torch.cat([t, t]), self._both).chunk(2)
        return output

    def predict_unconditional(self, x: Tensor, t: Tensor) -> Tensor:
        """The unconditional output for the x and t that `predict` was asked for last."""
        if self._ahead is None:
            return predict_output(self.unet, x, t, self.unconditional)
        output, self._ahead = self._ahead, None
        return output


def latent_shape(vae: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """(channels, height, width) of the latent of a square image of `resolution` pixels."""
    size = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, size, size


def default_time_ids(rows: int, size: int, device: torch.device) -> Tensor:
    """time_ids (rows, 6) of an uncropped square image of `size` pixels."""
    ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
    return upload(ids, device).expand(rows, -1)
