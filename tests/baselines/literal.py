"""What the tests of the baselines compute themselves, to compare a run with."""

from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from sharpening import sdxl
from sharpening.draws import Draws, DrawSampler, timestep_probabilities
from sharpening.trajectory import Schedule, ddim_step
from tests.support.objective import double_precision

CAPTIONS = [
    "a red circle on a white background", "a blue square on a gray background", "a green circle on a gray background",
    "a blue triangle on a white background",
]  # fmt: skip
LATENT = (4, 8, 8)  # of 32 px


def unet_with(model, weights=None, lora=False):
    """The UNet of a pipeline in float64, with other weights, or with those of an adapter, if they are given."""
    unet = trainable(model, lora).double()
    return double_precision(SimpleNamespace(unet=unet if weights is None else put(weights, unet))).unet


def trainable(model, lora):
    """The UNet of a pipeline as it trains, with an adapter or as a whole."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    if lora:
        unet.requires_grad_(False)
        unet.add_adapter(sdxl.lora_config(16, None))
    return unet


def put(weights, unet):
    """Put the weights that an optimizer moves, of an update that was seen, into a UNet."""
    with torch.no_grad():
        for parameter, value in zip(sdxl.trainable_parameters(unet), weights, strict=True):
            parameter.copy_(value)
    return unet


def together(forwards):
    """Some forwards as one: states, timesteps and conditions."""
    parts = ([getattr(forward, name) for forward in forwards] for name in ("x", "t", "condition"))
    x, t, conditions = parts
    return torch.cat(x), torch.cat(t), sdxl.Condition(*map(torch.cat, zip(*conditions, strict=True)))


def of(seen, purpose, step=None):
    """The forwards of a purpose, of one optimizer step or of all."""
    return [part for part in seen.forwards if part.purpose == purpose and step in (None, part.step)]


def rows_of(seen, purpose):
    return sum(len(part.x) for part in of(seen, purpose))


def schedule_of(steps):
    """The noise schedule of the tiny pipelines."""
    from tiny_world.make_tiny_sdxl import make_pipeline

    return Schedule.from_config(make_pipeline(seed=0).scheduler.config, steps)


def drawn(step, rows, batch_size):
    """The rows of the data of an optimizer step, from 0 on, of one process and seed 0, and their draws' numbers."""
    (batch,) = DrawSampler(rows, batch_size, 0, 1, 0, step, step + 1)
    return [row for row, _ in batch], [draw for _, draw in batch]


def noising(draws):
    """What is random about some draws of seed 0."""
    return Draws(0, timestep_probabilities(1000)).noising(draws, 1, LATENT)


def clean(x, t, eps):
    """The latents that were noised to x."""
    alpha, sigma = schedule_of(1).alpha_sigma(t, x)
    return (x - sigma * eps) / alpha


def samples(forwards, steps, guidance_scale):
    """The latents that the forwards of a generation of `steps` steps made, slice by slice."""
    schedule, latents = schedule_of(steps), []
    for last in forwards[steps - 1 :: steps]:
        x, t, output = last.x, last.t, last.output
        if guidance_scale != 1:
            x, t = x[: len(x) // 2], t[: len(t) // 2]
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        latents.append(ddim_step(schedule, *schedule.clean_and_noise(output, x, t), t))
    return torch.cat(latents)


def brightness(model, latents):
    """The mean of the image of each latent: what `write_reward`'s reward makes of it."""
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    return sdxl.decode_latents(vae, latents, len(latents)).mean((1, 2, 3))


def write_reward(folder, body="return images.mean((1, 2, 3))"):
    """A reward of the user's own."""
    (folder / "mine.py").write_text(f"import torch\n\n\ndef mine(images, prompts):\n    {body}\n")
    return f"{folder}/mine.py:mine"
