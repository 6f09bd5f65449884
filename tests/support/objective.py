"""What the tests of both objectives share: a small problem in either precision, gradients, and a memory meter."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sharpening import sdxl


class DoubleTimesteps(torch.nn.Module):
    """Sinusoidal features in float64; diffusers' own are float32, whose rounding depends on the batch size."""

    def __init__(self, original):
        super().__init__()
        self.frequencies = torch.logspace(0, -3, original.num_channels // 2, dtype=torch.float64)

    def forward(self, t):
        angles = t.double()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)


def double_precision(pipeline):
    """The pipeline with a UNet that computes in float64 throughout."""
    for name in ("time_proj", "add_time_proj"):
        setattr(pipeline.unet, name, DoubleTimesteps(getattr(pipeline.unet, name)))
    return pipeline


def problem(pipeline, prompts, n, dtype, t=None, size=4):
    """A UNet, its condition, and n noisy branches per prompt, in the layout of the script (row b * n + i)."""
    generator = torch.Generator().manual_seed(1)
    unet = pipeline.unet.to(dtype)
    width, pooled = unet.config.cross_attention_dim, pipeline.text_encoder_2.config.projection_dim
    condition = sdxl.Condition(
        torch.randn(prompts, 77, width, generator=generator).to(dtype),
        torch.randn(prompts, pooled, generator=generator).to(dtype),
        torch.tensor([[32, 32, 0, 0, 32, 32]]).expand(prompts, -1).to(dtype),
    )
    t = torch.tensor([5, 981, 41, 400])[:prompts] if t is None else t
    x_0 = torch.randn(prompts, 4, size, size, generator=generator).to(dtype).repeat_interleave(n, 0)
    eps = torch.randn(prompts * n, 4, size, size, generator=generator).to(dtype)
    return unet, condition, x_0, eps, t.repeat_interleave(n)


def gradient(unet):
    return torch.cat([parameter.grad.flatten() for parameter in unet.parameters()])


class LiveMemory(TorchDispatchMode):
    """The peak of bytes in live tensors that were made inside, counted by their storages."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        key = storage._cdata
        if key in self.known or storage.nbytes() == 0:
            return
        self.known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.release, key, storage.nbytes())

    def release(self, key, size):
        self.known.discard(key)
        self.live -= size


class ConvolutionalDenoiser(torch.nn.Module):
    """A stand-in with few operations and large activations, so that counting every storage stays quick."""

    def __init__(self):
        super().__init__()
        layers = [torch.nn.Conv2d(4, 128, 3, padding=1)]
        for _ in range(4):
            layers += [torch.nn.SiLU(), torch.nn.Conv2d(128, 128, 1)]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Conv2d(128, 4, 3, padding=1))

    def forward(self, x, t, encoder_hidden_states, added_cond_kwargs, return_dict):
        return (self.layers(x),)
