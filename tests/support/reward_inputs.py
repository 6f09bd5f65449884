"""Images and prompts that rewards are tried on."""

import torch
from PIL import Image

PROMPTS = ["a red circle", "two dogs on a beach, oil painting", "", "a red circle"]


def noise(count, height=48, width=48, seed=0):
    """Images `(B, 3, H, W)` whose values are whole 255ths, so that they survive a trip through PIL."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (images * 255).round() / 255


def to_pil(images):
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
