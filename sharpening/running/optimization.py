"""The optimizer and the average of the weights."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sharpening.errors import UserError


def make_adam(parameters: list[Parameter], eight_bit: bool, scaled: bool, **options: Any) -> Optimizer:
    """AdamW, or its 8-bit version from bitsandbytes; `scaled`: a GradScaler decides which of its steps are taken.

    On a CPU and on CUDA AdamW is the fused one, which needs no memory beside its states. It would hide from accelerate
    which steps a GradScaler has skipped; there, on CUDA, it takes all parameters together instead of one by one.

    Raises:
        UserError: bitsandbytes does not work here.
    """
    kinds = {parameter.device.type for parameter in parameters}
    fused = not scaled and kinds <= {"cpu", "cuda"}
    together = not fused and kinds == {"cuda"}
    optimizer_class: Callable[..., Optimizer] = partial(torch.optim.AdamW, fused=fused, foreach=together)
    if eight_bit:
        try:
            from bitsandbytes.optim import AdamW8bit
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"--use_8bit_adam needs bitsandbytes ({error}); install it or leave the flag out"
            ) from error
        optimizer_class = AdamW8bit
    return optimizer_class(parameters, **options)


def make_ema(unet: UNet2DConditionModel, parameters: list[Parameter], decay: float) -> EMAModel:
    """An exponential moving average of the weights that train, warmed up from the first step on."""
    # foreach: a few launches for all parameters together, where there were three for each.
    ema = EMAModel(parameters, decay=decay, foreach=True, model_cls=UNet2DConditionModel, model_config=unet.config)
    ema.to(unet.device)
    return ema


def restart(optimizer: Optimizer, lr_scheduler: LRScheduler, first_rates: Mapping[str, Any]) -> None:
    """Forget the optimizer's states, and go back to the learning rates of the scheduler's state `first_rates`."""
    optimizer.state.clear()
    lr_scheduler.load_state_dict(copy.deepcopy(first_rates))
    for group, rate in zip(optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def restart_average(ema: EMAModel, parameters: list[Parameter]) -> None:
    """Put the average into the parameters, and begin to average anew from there."""
    # Not by its copy_to, which copies all together: that is not to be had for weights in parts.
    for parameter, average in zip(parameters, ema.shadow_params, strict=True):
        parameter.data.copy_(average)
    ema.optimization_step = 0
