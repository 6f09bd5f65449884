"""T2I-CompBench's score of complex prompts: the mean of its scores of attributes, places and actions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharpening.flags import Flag
from sharpening.rewards.adjectives import without_adjectives
from sharpening.rewards.spatial_relation import find_relation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT_BLIP_VQA, DEFAULT_CLIP = "Salesforce/blip-vqa-base", "ViT-B-32/openai"
FLAGS = (
    Flag("t2i_complex_blip_vqa", f"model of its blip_vqa; unset: {DEFAULT_BLIP_VQA}"),
    Flag("t2i_complex_clip", f"model of its clip_non_spatial; unset: {DEFAULT_CLIP}"),
)


class T2IComplexReward:
    """T2I-CompBench's 3-in-1 score of complex prompts (Huang et al. 2023, arXiv 2307.06350), with another detector.

    The mean of `blip_vqa` and, by what the prompt says,

    - `t2i_spatial`, if it has a relation that t2i_spatial knows and no action: "the red hat was on top of the coat";
    - `clip_non_spatial`, if it has no such relation: "the black phone was resting on the brown charger", and also if
      it says no action either ("a red cube and a green house"), of which the benchmark has none;
    - both, if it has a relation and an action: "the colorful parrot sat next to the black cage".

    Each part is logged, NaN for prompts that do not ask for it. CLIP reads the prompt without the adjectives of its
    noun phrases; the benchmark also drops those behind "is" and "was". Range: [-1/2, 1], mostly 0.2 to 0.6.

    Close to the published numbers, not equal to them: what blip_vqa and t2i_spatial differ in, they differ in here,
    and many of its prompts say "on top of", which the benchmark scores 0. The benchmark reads from lists which prompts
    hold an action; here it is a verb other than a form of "be" beside the relation. Which words are adjectives is
    judged by word lists and endings, and not by spaCy.

    Args:
        blip_vqa: model of blip_vqa (`--t2i_complex_blip_vqa`).
        clip: model of clip_non_spatial (`--t2i_complex_clip`).
        detector, detector_threshold: as for T2ISpatialReward.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if a part cannot be had or does not fit.
    """

    def __init__(
        self,
        blip_vqa: str | None = None,
        clip: str | None = None,
        detector: str | None = None,
        detector_threshold: float | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.blip_vqa_network import BLIPVQAScorer
        from sharpening.rewards.open_clip_model import OpenCLIP
        from sharpening.rewards.t2i_spatial import T2ISpatialReward

        blip_vqa, clip = blip_vqa or DEFAULT_BLIP_VQA, clip or DEFAULT_CLIP
        common = (device, dtype, cache_dir)
        self.spatial = T2ISpatialReward(None, detector, detector_threshold, *common)
        self.blip_vqa = BLIPVQAScorer(f"--t2i_complex_blip_vqa {blip_vqa}", blip_vqa, *common)
        self.clip = OpenCLIP(f"--t2i_complex_clip {clip}", clip, *common)

    def get_reward(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        relations = [find_relation(prompt) for prompt in prompts]
        parts = {
            "blip_vqa": self.blip_vqa.score(images, prompts).cpu(),
            "spatial": self.spatial.score(images, relations),
            "clip": torch.full((len(prompts),), torch.nan),
        }
        rows = [row for row, relation in enumerate(relations) if relation is None or relation.action]
        if rows:
            texts = [without_adjectives(prompts[row]) for row in rows]
            parts["clip"][rows] = self.clip.cosine(images[rows], texts).cpu()
        return torch.stack(list(parts.values())).nanmean(dim=0), parts
