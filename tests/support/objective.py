"""What the tests of both objectives share: a small problem in either precision, its schedule, and gradients."""

from contextlib import contextmanager

import torch

from sharpening import sdxl
from sharpening.trajectory import Schedule

SDXL = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "set_alpha_to_one": False,
    "clip_sample": False,
    "prediction_type": "epsilon",
}


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


def double_schedule(pipeline, prediction_type="epsilon"):
    """The schedule of 25 steps in float64."""
    schedule = Schedule.from_config(pipeline.scheduler.config, 25, prediction_type)
    alphas = schedule.alphas_cumprod.double()
    return Schedule(alphas, float(alphas[0]), prediction_type, schedule.stride, schedule.timesteps)


@contextmanager
def default_dtype(dtype):
    """Within, tensors made of Python's or whole numbers have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def denoiser(unet, condition):
    """The UNet with a condition of R rows, unguided."""
    nothing = sdxl.Unconditional(torch.zeros_like(condition.embeds[:1]), torch.zeros_like(condition.pooled[:1]))
    return sdxl.Denoiser(unet, condition, nothing, 1.0)


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


class ConvolutionalDenoiser(torch.nn.Module):
    """A stand-in with few operations and large activations, so that counting every storage stays quick: 2 MB a layer
    for each row of 32 x 32, beside latents of 16 KB."""

    def __init__(self):
        super().__init__()
        first, last = torch.nn.Conv2d(4, 512, 1), torch.nn.Conv2d(512, 4, 1)
        self.layers = torch.nn.Sequential(first, *(torch.nn.SiLU() for _ in range(9)), last)

    def forward(self, x, t, encoder_hidden_states, added_cond_kwargs, return_dict):
        return (self.layers(x),)
