"""What precedes a run: the accelerator, and the plan that `--dry_run` prints. Does not import diffusers' models."""

import logging
import math
import os
import sys
from argparse import Namespace
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from sharpening.arguments import LORA_LAYERS, redact
from sharpening.errors import UserError
from sharpening.model_source import Source


def make_accelerator(args: Namespace) -> Accelerator:
    """The accelerator, with logging set up and secrets kept out of the trackers' view of `sys.argv`.

    Raises:
        UserError: the launcher started several processes that do not form a group.
    """
    sys.argv[:] = redact(sys.argv)
    accelerator = Accelerator(
        # Without a device and without being told, accelerate would let every process believe that it is alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, args.logging_dir)
        ),
    )
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    for noisy in ("accelerate", "httpx", "httpx2", "openai", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes but accelerate sees {accelerator.num_processes}: they would "
            "overwrite each other; launch with torchrun, or run `accelerate config` again"
        )
    return accelerator


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of frozen models and cached embeddings."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def describe(
    args: Namespace,
    source: Source,
    accelerator: Accelerator,
    data: str,
    cost: Mapping[str, float],
    steps_per_epoch: int,
    num_steps: int,
    reference: bool = False,
) -> str:
    """The resolved run as text: rows and forwards per optimizer step, length, and an estimate of the memory held.

    Args:
        data: what is trained on, e.g. "200 rows of NAME".
        cost: rows that one process puts through the UNet in an optimizer step, by purpose, and through the decoder by
            the purpose "decode".
        reference: a frozen copy of the UNet is held.

    The estimate counts what is always resident per process: the UNet's weights, gradients, the optimizer's states, the
    average and the reference. Activations, the other frozen models and the batch come on top; none grows with n or m.
    """
    world_size = accelerator.num_processes
    forwards = [f"{rows:g} rows to {purpose}" for purpose, rows in cost.items() if purpose != "decode"]
    total, trained = count_unet_parameters(args, source)
    half = 4 if weight_dtype(accelerator) == torch.float32 else 2
    held = {
        "weights": (total - trained) * half + trained * 4,
        "gradients": trained * 4,
        "Adam": trained * (2 if args.use_8bit_adam else 8),
        "EMA": trained * 4 * args.use_ema,
        "reference": total * half * reference,
    }
    parts = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in held.items() if size)
    training = f", LoRA of rank {args.lora_rank}: {trained / 1e6:.1f}M train" if args.use_lora else ""
    lines = {
        "model": f"{source.name}, UNet of {total / 1e6:.1f}M parameters{training}",
        "data": data,
        "reward": args.reward_model,
        "preset": f"{args.preset} (n = {args.num_noisy_latents} branches, m = {args.trajectory_nums} steps of "
        f"{args.infer_steps} per trajectory)",
        "rows per step": f"{args.train_batch_size * args.gradient_accumulation_steps * world_size} = "
        f"{args.train_batch_size} per batch x {args.gradient_accumulation_steps} accumulated x {world_size} processes",
        "forwards per step": f"{', '.join(forwards)}, per process",
        "decodes per step": f"{cost['decode']:g}, per process",
        "steps": f"{num_steps}, {steps_per_epoch} per epoch, {num_steps / steps_per_epoch:.2f} epochs",
        "memory held": f"{sum(held.values()) / 2**30:.2f} GiB per process ({parts}), without activations and other "
        "frozen models",
        "output": args.output_dir,
    }
    return "\n".join(f"{name:>18}  {value}" for name, value in lines.items())


def count_unet_parameters(args: Namespace, source: Source) -> tuple[int, int]:
    """How many parameters the UNet has and how many train, no weight read or allocated."""
    shapes = source.shapes("unet") or _shapes_by_config(source)
    total = sum(math.prod(shape) for shape in shapes.values())
    if not args.use_lora:
        return total, total
    adapted = [shape for name, shape in shapes.items() if name.removesuffix(".weight").endswith(LORA_LAYERS)]
    return total, sum(args.lora_rank * (rows + columns) for rows, columns in adapted)


def _shapes_by_config(source: Source) -> dict[str, tuple[int, ...]]:
    """Of a UNet whose weights are not here yet."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(source.read_json("unet/config.json"))
    return {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
