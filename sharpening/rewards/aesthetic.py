"""LAION's aesthetic predictor: a rating of the image alone, read off its CLIP embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharpening.errors import UserError, first_line
from sharpening.flags import Flag
from sharpening.rewards.checkpoint_files import find_checkpoint, read_state_dict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLIP = "ViT-L-14/openai"  # the one that the predictor was trained on
FLAGS = (Flag("aesthetic_clip", f"CLIP of the aesthetic reward; unset: {CLIP}"),)


class AestheticReward:
    """LAION's aesthetic predictor v2 (Schuhmann 2022): linear layers on the CLIP embedding of the image alone.

    Range: a rating from 1 to 10; about 5 to 6.5 for what text-to-image models draw. The prompt plays no part.

    Args:
        model: the published `sac+logos+ava1-l14-linearMSE.pth`: path, folder, or hub id (`aesthetic:MODEL` in the
            spec). Its few layers are always float32.
        clip: the CLIP it was trained on (`--aesthetic_clip`), named as `--clip_model` names it.
        device, dtype, cache_dir: as for CLIPScoreReward; dtype is of the CLIP.

    Raises:
        UserError: naming the flag, if the checkpoint or CLIP cannot be had or do not fit.
    """

    def __init__(
        self,
        model: str = "camenduru/improved-aesthetic-predictor",
        clip: str = CLIP,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.image_reward_network import linear_head
        from sharpening.rewards.open_clip_model import OpenCLIP

        flag = f"--reward_model aesthetic:{model}"
        path = find_checkpoint(flag, model, "sac+logos+ava1-l14-linearMSE.pth", cache_dir)
        weights = {name.removeprefix("layers."): tensor for name, tensor in read_state_dict(flag, path).items()}
        self.clip = OpenCLIP(f"--aesthetic_clip {clip}", clip, device, dtype, cache_dir)
        try:
            self.head = linear_head(weights).requires_grad_(False)
            self.head.load_state_dict(weights)
        except Exception as error:
            raise UserError(f"{flag}: {path} is not that predictor ({first_line(error)}); give its file") from error
        self.head.to(self.clip.device)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.clip.embed_images(images)).squeeze(1)
