"""What a training run may cost, in forwards of one row through the UNet.

A row that is trained on costs three, a decoded latent what its floating-point operations cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
MODEL = "tiny_world/sdxl"
SFT, RLHF = "train_sft_diffusion_sharpening_sdxl", "train_rlhf_diffusion_sharpening_sdxl"  # paths without .py
DPO, BEST_OF_N, DDPO, D3PO = (f"baselines/{name}" for name in ("diffusion_dpo", "best_of_n", "ddpo", "d3po"))


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
    """Forwards of a row that an optimizer step of a script needs, by its own account."""
    module, args = _parsed(script, flags)
    return _forwards(module.rows_per_step(args), decode)


def compute_before(script: str, flags: Mapping[str, object], decode: float) -> float:
    """Forwards of a row to draw and to judge what a script keeps for its whole run."""
    if script not in (DPO, BEST_OF_N):
        return 0
    module, args = _parsed(script, flags)
    return _forwards(module.rows_before(args, len(Path(flags["prompts_file"]).read_text().splitlines())), decode)


def compute(script: str, flags: Mapping[str, object], decode: float, updates: int) -> float:
    """Forwards of a row that a run of so many optimizer steps needs."""
    return compute_before(script, flags, decode) + updates * compute_per_update(script, flags, decode)


def updates_within(budget: float, script: str, flags: Mapping[str, object], decode: float, rounds: int = 1) -> int:
    """Optimizer steps that a script can make for `budget` forwards, at least 2 in each of its rounds."""
    left = budget - compute_before(script, flags, decode)
    return rounds * max(2, int(left / compute_per_update(script, flags, decode) / rounds))


def _parsed(script: str, flags: Mapping[str, object]) -> tuple[ModuleType, argparse.Namespace]:
    module = import_module(script.replace("/", "."))
    return module, module.parse_args(words({**flags, "output_dir": "none"}))


def _forwards(rows: Mapping[str, float], decode: float) -> float:
    weights = {"train": 3, "decode": decode}
    return sum(weights.get(purpose, 1) * count for purpose, count in rows.items())
