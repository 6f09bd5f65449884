"""A UNet that lies in parts on several processes (`--fsdp`): how it is taken apart, and how parts become wholes.

The parts are those of torch's `fully_shard` (FSDP2): each process holds a slice of every weight, as a DTensor, and so
of its gradient, of the optimizer's states and of its average. A forward gathers one block at a time.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

GATHERED_AT_ONCE = (BasicTransformerBlock, ResnetBlock2D)


def shard(unet: UNet2DConditionModel, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """Take a UNet, the same on every process, apart, in place; each keeps its part on its device.

    A block is gathered in `dtype` for its forward and again for its backward, and let go after each; what belongs to
    no block is gathered for the whole forward. In each backward the gradients are averaged over the processes, in
    float32, as DDP averages them.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Inputs stay as they are: time_ids, in pixels, would be rounded.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [module for module in unet.modules() if isinstance(module, GATHERED_AT_ONCE)]
    # The root, too, lets its weights go: kept, they would be the old ones in a forward that follows an optimizer step.
    modules = [*blocks, unet]
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if not any(parameter.requires_grad for parameter in unet.parameters()):
        unet.register_forward_hook(lambda *_: _forget_order(modules))
    return unet


def _forget_order(modules: Iterable[FSDPModule]) -> None:
    """Forget in which order blocks ran. torch 2.10 notes it for the backward, which forgets it, but a frozen UNet has
    none: the notes would grow with each forward."""
    for module in modules:
        group = module._get_fsdp_state()._fsdp_param_group
        group._post_forward_indices.clear()
        group.comm_ctx.post_forward_order.clear()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; the tensor itself if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered onto the CPU, on the first process; on others, which must call this too, nothing is left of
    it. What is whole already stays as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if torch.distributed.get_rank() == 0 else torch.empty(0)


def part(value: Tensor, like: Tensor) -> Tensor:
    """A whole value, which each process has, taken apart as another tensor is, if that is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_list(value: Any) -> Any:
    """A list of tensors, gathered as `whole` gathers them; anything else as it is."""
    return [whole(tensor) for tensor in value] if isinstance(value, list) else value


def whole_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet gathered onto the CPU, on the first process; on others, which must call this too, it has no weights. One
    that is whole already stays as it is."""
    if not any(isinstance(parameter, DTensor) for parameter in unet.parameters()):
        return unet
    with torch.device("meta"):
        gathered = UNet2DConditionModel.from_config(unet.config)
    state = {name: whole(parameter) for name, parameter in unet.named_parameters()}
    if torch.distributed.get_rank() == 0:
        gathered.load_state_dict(state, assign=True)
    return gathered


def load_whole(unet: UNet2DConditionModel, saved: UNet2DConditionModel) -> None:
    """Take the weights of a UNet that is whole and of which each process has a copy."""
    like = dict(unet.named_parameters())
    unet.load_state_dict({name: part(value, like.get(name, value)) for name, value in saved.state_dict().items()})


def whole_average(ema: EMAModel) -> EMAModel:
    """An average of weights, gathered as `whole` gathers them."""
    gathered = copy.copy(ema)
    gathered.shadow_params = [whole(average) for average in ema.shadow_params]
    return gathered


def save_whole_states(optimizer: Optimizer) -> None:
    """From now on the optimizer's state dict, which every process must ask for, is whole on the first one, and what it
    loads is taken apart: checkpoints are those of a run whose weights lie whole on each process."""

    def gather(optimizer: Optimizer, state_dict: dict) -> dict:
        state = {index: {k: whole(v) for k, v in of.items()} for index, of in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def scatter(optimizer: Optimizer, state_dict: dict) -> dict:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {k: part(v, parameters[index]) if v.shape == parameters[index].shape else v for k, v in of.items()}
            for index, of in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(scatter)
