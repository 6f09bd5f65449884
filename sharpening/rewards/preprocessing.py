"""What reward models want: images resized, cropped or padded, and normalized, as tensors throughout."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CPU_SLICE = 4  # rows per forward on the CPU: the activations of more leave its caches, and every row gets slower


def preprocess(
    images: Tensor,
    size: int | tuple[int, int],
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest",
    interpolation: str = "bicubic",
    fill: float = 0.0,
) -> Tensor:
    """Images `(B, 3, H, W)` in [0, 1] as `(B, 3, *size)`, normalized by `mean` and `std`.

    "shortest" fits the shorter side and crops the centre, "longest" fits the longer side and pads with `fill` (in
    [0, 1]) around it, "squash" changes the aspect ratio. Antialiased, and clamped to [0, 1] after the resize: the
    published paths resize 8-bit images, which cannot overshoot at edges as a bicubic filter on floats does. PIL also
    rounds to 8 bits, twice; `tests/rewards/test_clip.py` bounds the difference.
    """
    height, width = (size, size) if isinstance(size, int) else size
    shape = [height, width]
    if resize_mode == "shortest":
        shape = [min(height, width)]  # one number: of the shorter side
    elif resize_mode == "longest":
        scale = min(height / images.shape[2], width / images.shape[3])
        shape = [max(1, round(side * scale)) for side in images.shape[2:]]
    images = F.resize(images, shape, interpolation=InterpolationMode(interpolation), antialias=True).clamp(0, 1)
    if resize_mode == "longest":
        vertical, horizontal = height - images.shape[2], width - images.shape[3]
        borders = [horizontal // 2, vertical // 2, horizontal - horizontal // 2, vertical - vertical // 2]
        images = F.pad(images, borders, fill=fill)
    return F.normalize(F.center_crop(images, [height, width]), list(mean), list(std))


def to_uint8(images: Tensor) -> np.ndarray:
    """Images `(B, 3, H, W)` in [0, 1] as `(B, H, W, 3)` uint8."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def in_slices(network: Callable[..., Tensor], *inputs: Tensor, most: int | None = None) -> Tensor:
    """`network(*inputs)` for inputs of B rows each: a few rows at a time on the CPU, whole or `most` rows on a GPU."""
    size = CPU_SLICE if inputs[0].device.type == "cpu" else most or len(inputs[0])
    return torch.cat([network(*rows) for rows in zip(*(part.split(size) for part in inputs), strict=True)])
