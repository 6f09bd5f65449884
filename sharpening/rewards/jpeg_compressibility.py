"""How small the image is as a JPEG: a reward without weights."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class JPEGCompressibilityReward:
    """Minus the size in kilobytes (1000 bytes) of the image as a JPEG of quality 95; the prompt plays no part.

    Range: below 0; around -100 for a photograph of 512 px, near -1 for one of 32 px. Needs no weights, so it suits a
    first trial of a training run. Source: the compressibility task of DDPO (Black et al. 2023, arXiv 2305.13301).
    """

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        import torch
        from PIL import Image

        from sharpening.rewards.preprocessing import to_uint8

        kilobytes = []
        for image in to_uint8(images):
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="JPEG", quality=95)
            kilobytes.append(file.tell() / 1000)
        return -torch.tensor(kilobytes, dtype=torch.float32)
