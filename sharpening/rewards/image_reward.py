"""ImageReward: how people would rate the image for its prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ImageRewardReward:
    """ImageReward (Xu et al. 2023, arXiv 2304.05977): how people would rate the image for this prompt.

    Range: unbounded, normalized to mean 0 and standard deviation 1 over its authors' images; about -2 to 2. Prompts
    are cut at 35 tokens. Images stay tensors. Against the authors' path through PIL a score moves by the rounding
    of PIL's resize: `tests/rewards/test_image_reward.py` bounds it.

    Args:
        model: the published `ImageReward.pt`: path, folder, or hub id `owner/repository[/file]`
            (`image_reward:MODEL` in the spec). Every key of it must fit. The vocabulary of bert-base-uncased is read
            from a `vocab.txt` beside a local checkpoint if there is one, else from the hub.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if the checkpoint or the vocabulary cannot be had or does not fit.
    """

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.image_reward_network import ImageRewardScorer

        self.scorer = ImageRewardScorer(f"--reward_model image_reward:{model}", model, device, dtype, cache_dir)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.scorer.score(images, prompts)
