"""Any picture as a square for the VAE, with SDXL's micro-conditioning."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def crop_and_resize(
    image: Image.Image, resolution: int, center_crop: bool, random_flip: bool, rng: torch.Generator
) -> tuple[Tensor, tuple[int, int, int, int, int, int]]:
    """A square of `image` for the VAE, and SDXL's micro-conditioning for exactly that square.

    The image is turned upright by its EXIF tag, put on white where it is transparent, brought to RGB, scaled so that
    its shorter side is `resolution` (R), perhaps mirrored, then cropped in the centre or at random.

    Returns:
        pixels (3, R, R) float32 in [-1, 1], and (original height, original width, crop top, crop left, R, R). The
        original size is that of the upright image. The corner counts in the scaled image as the model sees it, that
        is after mirroring: the pixels are that image's [top : top + R, left : left + R].

    Raises:
        ValueError: pixels of unknown range (mode F), or a picture so narrow that scaling it would flood the memory.
    """
    image = _to_rgb(ImageOps.exif_transpose(image))
    original_width, original_height = image.size
    shorter = min(image.size)
    width, height = original_width * resolution // shorter, original_height * resolution // shorter
    if Image.MAX_IMAGE_PIXELS is not None and width * height > max(Image.MAX_IMAGE_PIXELS, resolution**2):
        raise ValueError(f"it is {original_width} x {original_height}, too narrow for a square crop")
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    # Mirrored before the crop, so that the crop's corner needs no correction afterwards.
    if random_flip and torch.rand((), generator=rng) < 0.5:
        image = ImageOps.mirror(image)
    top, left = (
        round(spare / 2) if center_crop else int(torch.randint(spare + 1, (), generator=rng))
        for spare in (height - resolution, width - resolution)
    )
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels.contiguous(), (original_height, original_width, top, left, resolution, resolution)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of gray, which PIL's own conversion would clip at 255 rather than scale.
        values = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
