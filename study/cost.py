"""What a training run may cost, in forwards of one row through the UNet.

A row that is trained on costs three, a decoded latent what its floating-point operations cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "tiny_world/sdxl"
SFT, RLHF = "train_sft_diffusion_sharpening_sdxl", "train_rlhf_diffusion_sharpening_sdxl"  # paths without .py
TRAINING_PROMPTS = 45


def words(flags: Mapping[str, object]) -> list[str]:
    """A command line."""
    given = {name: value for name, value in flags.items() if value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def decode_cost() -> float:
    """What decoding a latent costs, in forwards of a row through the UNet, by floating-point operations."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    unet = UNet2DConditionModel.from_pretrained(ROOT / MODEL, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(ROOT / MODEL, subfolder="vae")
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
    latent = torch.zeros(1, 4, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        unet(latent, torch.tensor([500]), torch.zeros(1, 77, width), added_cond_kwargs=added)
    with torch.no_grad(), FlopCounterMode(display=False) as decode:
        vae.decode(latent)
    return decode.get_total_flops() / forward.get_total_flops()


def compute_per_update(script: str, flags: Mapping[str, object], decode: float) -> float:
    """Forwards of a row that an optimizer step of the method needs.

    That is less than the script spends where it looks at more than it must: one noise needs no score; a pair that was
    judged by its samples none before its one gradient step; regression on the best branch no reference; and pairs
    drawn once are judged once (see `compute_before`).
    """
    module = import_module(script.replace("/", "."))
    args = module.parse_args(words({**flags, "output_dir": "none"}))
    rows = module.rows_per_step(args)
    if args.num_noisy_latents == 1:
        rows |= {"score": 0, "decode": 0}
    if script == RLHF and args.reward_on == "sample" and args.trajectory_nums == 1:
        rows |= {"score": 0}
    if script == RLHF and args.train_on == "best":
        rows |= {"reference": 0}
    if script == RLHF and args.generate_with == "reference":
        rows |= {"generate": 0, "decode": 0}
    weights = {"generate": 1, "score": 1, "reference": 1, "train": 3, "decode": decode}
    return sum(weights[name] * count for name, count in rows.items())


def compute_before(flags: Mapping[str, object], decode: float) -> float:
    """Forwards of a row to draw and to judge a frozen reference's latents, once."""
    if flags.get("generate_with") != "reference":
        return 0
    return TRAINING_PROMPTS * flags["reference_sets"] * flags["num_noisy_latents"] * (flags["infer_steps"] + decode)
