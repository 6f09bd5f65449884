"""Pipelines with random weights for the benchmarks: the tiny SDXL, a mid-size one for a CPU, and SDXL as published.

Weights cost what they cost whatever their values. Text encoders are two layers deep: the scripts cache what they give.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tiny_world.tiny_sdxl import make_pipeline, text_config

SIZES = ("tiny", "mid", "sdxl")
TINY_DECODER = "tiny_decoder"  # the folder of a decoder in the manner of TAESD, beside the pipeline's parts


def write_pipeline(size: str, folder: Path, dtype: torch.dtype) -> None:
    """Save a pipeline of a size in `SIZES`, and a small decoder for `--reward_vae` in `folder / TINY_DECODER`.

    "mid" has SDXL's shape with 0.4 of its width and fewer transformer blocks, 128M parameters; its VAE costs 1.4
    forwards a decode, as SDXL's costs 1.6.
    """
    pipeline = make_pipeline(seed=0)
    decoder_width = 8
    if size != "tiny":
        published = size == "sdxl"
        text_widths = (768, 1280) if published else (128, 128)
        configs = [
            text_config(tokenizer, width, width // 64, "quick_gelu")
            for tokenizer, width in zip((pipeline.tokenizer, pipeline.tokenizer_2), text_widths, strict=True)
        ]
        parts = {
            "unet": _unet((320, 640, 1280), (1, 2, 10), text_widths)
            if published
            else _unet((128, 256, 512), (1, 1, 2), text_widths),
            "vae": _vae((128, 256, 512, 512) if published else (32, 64, 128, 128)),
            "text_encoder": CLIPTextModel(configs[0]),
            "text_encoder_2": CLIPTextModelWithProjection(configs[1]),
        }
        decoder_width = 64 if published else 16
        pipeline = StableDiffusionXLPipeline(**{**pipeline.components, **parts})
    levels = len(pipeline.vae.config.block_out_channels)
    decoder = AutoencoderTiny(
        encoder_block_out_channels=(decoder_width,) * levels,
        decoder_block_out_channels=(decoder_width,) * levels,
        num_encoder_blocks=(1,) + (3,) * (levels - 1),
        num_decoder_blocks=(3,) * (levels - 1) + (1,),
    )
    pipeline.to(dtype=dtype).save_pretrained(folder)
    decoder.to(dtype).save_pretrained(folder / TINY_DECODER)


def _unet(widths: tuple[int, ...], transformer_layers: tuple[int, ...], text: tuple[int, int]) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=widths,
        transformer_layers_per_block=transformer_layers,
        attention_head_dim=tuple(width // 64 for width in widths),
        cross_attention_dim=sum(text),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + text[1],
    )


def _vae(widths: tuple[int, ...]) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
        force_upcast=False,  # as the fp16-fix VAE
    )
