"""The optimizer and the average of the weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn import Parameter
from torch.optim import Optimizer

from sharpening.errors import UserError


def make_adam(parameters: list[Parameter], eight_bit: bool, scaled: bool, **options: Any) -> Optimizer:
    """AdamW, or its 8-bit version from bitsandbytes; `scaled`: a GradScaler decides which of its steps are taken.

    On a CPU and on CUDA AdamW is the fused one, which needs no memory beside its states. It would hide from accelerate
    which steps a GradScaler has skipped.

    Raises:
        UserError: bitsandbytes does not work here.
    """
    fused = not scaled and {parameter.device.type for parameter in parameters} <= {"cpu", "cuda"}
    optimizer_class: Callable[..., Optimizer] = partial(torch.optim.AdamW, fused=fused)
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
    ema = EMAModel(parameters, decay=decay, model_cls=UNet2DConditionModel, model_config=unet.config)
    ema.to(unet.device)
    return ema
