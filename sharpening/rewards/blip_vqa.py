"""T2I-CompBench's score of attribute binding: BLIP is asked for each thing that the prompt names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BLIPVQAReward:
    """BLIP-VQA, T2I-CompBench's score of attribute binding (Huang et al. 2023, arXiv 2307.06350).

    For every noun phrase of the prompt, "a red apple", the probability that BLIP (Li et al. 2022, arXiv 2201.12086)
    answers yes rather than no to "a red apple?"; the score is their product. Range: [0, 1]. The benchmark reports the
    mean over the images of its colour, shape and texture prompts. `sharpening/rewards/blip_vqa_network.py` says what
    differs from its code: above all, the phrases are found by rules that know its forms of prompts, not by a parser.

    Args:
        model: hub id or folder of a transformers BlipForQuestionAnswering with its processor (`blip_vqa:MODEL` in the
            spec).
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if a part cannot be had or does not fit.
    """

    def __init__(
        self,
        model: str = "Salesforce/blip-vqa-base",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.blip_vqa_network import BLIPVQAScorer

        self.scorer = BLIPVQAScorer(f"--reward_model blip_vqa:{model}", model, device, dtype, cache_dir)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.scorer.score(images, prompts)
