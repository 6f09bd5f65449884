"""HPS v2: a CLIP trained on human preferences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharpening.rewards.checkpoint_files import find_checkpoint, name_and_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class HPSv2Reward:
    """HPS v2.1 (Wu et al. 2023, arXiv 2306.09341): a CLIP ViT-H-14 trained on human preferences.

    Range: a cosine, [-1, 1]; about 0.2 to 0.35. Images that are not square are padded with black, as published.

    Args:
        model: the published `HPS_v2.1_compressed.pt`: path, folder, or hub id (`hpsv2:MODEL` in the spec). A state
            dict of another architecture of open_clip is written `ARCHITECTURE=PATH`.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if the checkpoint cannot be had or does not fit.
    """

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.open_clip_model import OpenCLIP

        flag = f"--reward_model hpsv2:{model}"
        architecture, name = name_and_path(model)
        path = find_checkpoint(flag, name, "HPS_v2.1_compressed.pt", cache_dir)
        self.clip = OpenCLIP(flag, f"{architecture or 'ViT-H-14'}/{path}", device, dtype, cache_dir)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.clip.cosine(images, prompts, "longest")
