"""The accelerator of a run, and what the run will hold in memory. Does not import diffusers' models."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from textwrap import TextWrapper

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProjectConfiguration,
)
from huggingface_hub.utils import disable_progress_bars

from sharpening.errors import UserError
from sharpening.model_source import LORA_LAYERS, Source

logger = logging.getLogger(__name__)


def process_options(timeout_minutes: float, initial_loss_scale: float | None) -> list[KwargsHandler]:
    """How processes work together and where fp16's loss scale begins, as `Accelerator` takes it.

    timeout_minutes is how long a process waits for the others. Gradients live in the buckets that are exchanged, not
    beside them: that is one copy of the trained parameters less.
    """
    options = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)),
    ]
    return options if initial_loss_scale is None else [*options, GradScalerKwargs(init_scale=initial_loss_scale)]


def group_of_hosts(timeout_minutes: float) -> torch.distributed.ProcessGroup | None:
    """The group in which several processes exchange what lies on the host: of gloo, where the default one is not."""
    if not torch.distributed.is_initialized() or torch.distributed.get_backend() == "gloo":
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def any_rank(value: int, hosts: torch.distributed.ProcessGroup | None) -> int:
    """The largest `value` over all ranks, so that every rank takes the same turn; asked of the hosts, as of
    `group_of_hosts`, which need not wait for their devices."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    largest = torch.tensor([value])
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=hosts)
    return int(largest)


def sum_over_ranks(values: torch.Tensor, hosts: torch.distributed.ProcessGroup | None) -> torch.Tensor:
    """The sum over all ranks of values on the host, the same on every rank, asked as `any_rank` asks."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values, group=hosts)
    return values


def warn_of_accumulation(steps: int) -> None:
    """Say so if accelerate was told another number than `--gradient_accumulation_steps`."""
    told = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(steps))
    if told != str(steps):
        logger.warning(
            f"accelerate's own gradient_accumulation_steps={told} is ignored: --gradient_accumulation_steps={steps} "
            "is what counts"
        )


def make_accelerator(
    output_dir: Path,
    logging_dir: str,
    mixed_precision: str | None,
    report_to: str,
    allow_tf32: bool,
    options: Sequence[KwargsHandler] = (),
) -> Accelerator:
    """The accelerator, with logging set up; options as of `process_options`.

    Raises:
        UserError: the launcher started several processes that do not form a group.
    """
    accelerator = Accelerator(
        # Without a device and without being told, accelerate would let every process believe that it is alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        # The scripts take all prompts of a step at once; accelerate would divide their loss by its config's number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=list(options),
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(
            project_dir=str(output_dir), logging_dir=os.path.join(output_dir, logging_dir)
        ),
    )
    set_up_logging(accelerator.is_main_process)
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes but accelerate sees {accelerator.num_processes}: they would "
            "overwrite each other; launch with torchrun, or run `accelerate config` again"
        )
    return accelerator


def set_up_logging(is_main: bool) -> None:
    """The main process says what this project has to say and what libraries warn of, the others only errors."""
    logging.basicConfig(level=logging.WARNING if is_main else logging.ERROR, format="%(message)s")
    logging.getLogger("sharpening").setLevel(logging.INFO if is_main else logging.ERROR)
    if not is_main:
        datasets.disable_progress_bars()
        disable_progress_bars()
    # It warns at import of a missing kernel for 4-bit layers, which nothing here has.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of frozen models and cached embeddings."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def memory_held(
    parameters: tuple[int, int], half: bool, adam_8bit: bool, ema: bool, reference: bool, parts: int = 1
) -> str:
    """An estimate of what is resident in a process: the UNet's weights and their copies in half precision, which
    autocast keeps during a pass, gradients, the optimizer's states, the average and a frozen copy as the reference.
    parameters: how many the UNet has, and how many of them train. parts: of how many processes each holds one part of
    all that (`--fsdp`); then the copies are those of a block, for its forward.

    The buckets in which several processes exchange gradients are views of the gradients and take nothing. What is left
    out is said; none of it grows with n or m.
    """
    total, trained = (count / parts for count in parameters)
    frozen_bytes = 2 if half else 4
    held = {
        "weights": (total - trained) * frozen_bytes + trained * 4,
        "autocast": trained * 2 * (half and parts == 1),
        "gradients": trained * 4,
        "Adam": trained * (2 if adam_8bit else 8),
        "EMA": trained * 4 * ema,
        "reference": total * frozen_bytes * reference,
    }
    listed = " + ".join(f"{name} {size / 2**30:.2f}" for name, size in held.items() if size)
    left_out = "activations, the VAE, the reward model, validation's images and what the GPU's driver takes"
    if parts > 1:
        left_out = f"the block that is gathered, {left_out}"
    return f"{sum(held.values()) / 2**30:.2f} GiB per process ({listed}), without {left_out}"


def as_plan(lines: Mapping[str, str]) -> str:
    """The resolved run as text, a line for each entry, those too long for a screen of 100 columns broken."""
    wrap = TextWrapper(100, subsequent_indent=" " * 20, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap.fill(f"{name:>18}  {value}") for name, value in lines.items())


def count_unet_parameters(source: Source, lora_rank: int | None = None) -> tuple[int, int]:
    """How many parameters the UNet has and how many train, no weight read or allocated; with a rank, its adapter."""
    shapes = source.shapes("unet") or _shapes_by_config(source)
    total = sum(math.prod(shape) for shape in shapes.values())
    if lora_rank is None:
        return total, total
    adapted = [shape for name, shape in shapes.items() if name.removesuffix(".weight").endswith(LORA_LAYERS)]
    return total, sum(lora_rank * (rows + columns) for rows, columns in adapted)


def _shapes_by_config(source: Source) -> dict[str, tuple[int, ...]]:
    """Of a UNet whose weights are not here yet."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(source.read_json("unet/config.json"))
    return {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
