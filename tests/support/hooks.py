"""What passes through the models of a run, seen by hooks on their modules."""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch.nn.modules.module import register_module_forward_hook


class Forward(NamedTuple):
    """One forward of a UNet, R rows."""

    unet: torch.nn.Module
    x: torch.Tensor  # (R, 4, h, w)
    t: torch.Tensor  # (R,)
    without_prompt: torch.Tensor  # (R,) bool: the embedding is zero, which is how SDXL says it
    frozen: bool  # no parameter trains, or the adapter is switched off
    gradient: bool

    @property
    def purpose(self):
        """Of a forward of the two scripts, if no branch ever stands on the sampler's grid; see `OFF_GRID`."""
        if self.frozen:
            return "reference"
        if self.gradient or self.without_prompt.all():  # the unconditional part of guidance has no gradient
            return "train"
        return "generate" if (self.t % 200 == 1).all() else "score"


# With 5 sampling steps of 200 from 801 on: branches begin at 602 to 800 and have all of their first three steps.
OFF_GRID = {
    "infer_steps": 5, "timestep_bias_strategy": "range", "timestep_bias_begin": 602, "timestep_bias_end": 801,
    "timestep_bias_multiplier": 1e12,
}  # fmt: skip


def adapter_is_off(unet):
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(module.disable_adapters for module in unet.modules() if isinstance(module, BaseTunerLayer))


@contextmanager
def unet_forwards():
    """The forwards of every UNet within."""
    seen = []

    def record(module, args, kwargs, output):
        if isinstance(module, UNet2DConditionModel):
            x, t = (part.detach().clone() for part in args)
            without_prompt = kwargs["encoder_hidden_states"].abs().flatten(1).amax(1) == 0
            frozen = not any(part.requires_grad for part in module.parameters()) or adapter_is_off(module)
            seen.append(Forward(module, x, t, without_prompt, frozen, torch.is_grad_enabled()))

    handle = register_module_forward_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def rows_through(*kinds):
    """How many rows each forward of a module of these classes has within."""
    seen = []

    def record(module, args, kwargs, output):
        if isinstance(module, kinds):
            seen.append(len(args[0] if args else next(iter(kwargs.values()))))

    handle = register_module_forward_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
