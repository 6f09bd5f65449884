"""T2I-CompBench's score of spatial relations: a detector finds both things, a rule judges where their boxes lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharpening.flags import Flag
from sharpening.rewards.spatial_relation import (
    RELATIONS,
    Detection,
    Relation,
    find_relation,
    scale_of_benchmark,
    spatial_score,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT_DETECTOR = "IDEA-Research/grounding-dino-base"
FLAGS = (
    Flag(
        "detector",
        "of t2i_spatial and t2i_complex: hub id or folder of a Grounding DINO or OWLv2, e.g. "
        f"google/owlv2-base-patch16-ensemble; unset: {DEFAULT_DETECTOR}",
    ),
    Flag(
        "detector_threshold",
        "score above which the detector reports a box; unset: 0.35 for Grounding DINO, 0.1 for OWLv2",
        float,
        range="[0, 1)",
    ),
)


class T2ISpatialReward:
    """T2I-CompBench's score of spatial relations (Huang et al. 2023, arXiv 2307.06350), with another detector.

    Of a prompt such as "a cat on the left of a dog" both things are looked for, girl, boy, man and woman as a person,
    and the best box of each is taken; "a man near a woman" is twice the same box, as in the benchmark. The score is
    0.25 x both scores of the detector + 0.5 x how well the relation holds between the boxes
    (`sharpening/rewards/spatial_relation.py`); what is below 0.5 becomes 0. Range: 0, or [0.5, 1]. The benchmark
    reports the mean over ten images of each prompt.

    Close to the published numbers, not equal to them: they come from UniDet, which knows a list of classes, finds a
    thing of no other, and reports what it scores above 0.5. `spatial_relation.py` says what else differs: above all,
    "on top of" is judged as "on the top of", where the benchmark gives 0.

    A prompt needs one of the relations next to, near, on side of, on the left / right / top / bottom of, on top /
    bottom of, with a thing on either side. One without it cannot be scored: `--reward_failure` decides what follows.

    Args:
        model: hub id or folder of the detector (`t2i_spatial:MODEL` in the spec); wins over `detector`.
        detector: the same (`--detector`).
        detector_threshold: the score above which the detector reports a box (`--detector_threshold`); None is 0.35
            for Grounding DINO and 0.1 for OWLv2.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if a part cannot be had or does not fit.
    """

    def __init__(
        self,
        model: str | None = None,
        detector: str | None = None,
        detector_threshold: float | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.zero_shot_detector import load_detector

        name = model or detector or DEFAULT_DETECTOR
        flag = f"--reward_model t2i_spatial:{name}" if model else f"--detector {name}"
        self.detector = load_detector(flag, name, detector_threshold, device, dtype, cache_dir)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        from sharpening.rewards.calling import RowsFailed

        relations = [find_relation(prompt) for prompt in prompts]
        scores = self.score(images, relations)
        unknown = [row for row, relation in enumerate(relations) if relation is None]
        if unknown:
            why = (
                f"needs two things with one of the relations {', '.join(RELATIONS)} between them, as in 'a cat on the "
                "left of a dog', and found none"
            )
            raise RowsFailed(scores, dict.fromkeys(unknown, why))
        return scores

    def score(self, images: Tensor, relations: list[Relation | None]) -> Tensor:
        """Scores `(B,)` float32 of images `(B, 3, H, W)` in [0, 1]; NaN where there is no relation."""
        import torch

        rows = [row for row, relation in enumerate(relations) if relation is not None]
        scores = torch.full((len(relations),), torch.nan)
        if rows:
            asked = [relations[row] for row in rows]
            found = self.detector.detect(images[rows], [(each.first, each.second) for each in asked])
            scale = scale_of_benchmark(*images.shape[2:])
            scores[rows] = torch.tensor(
                [
                    spatial_score(relation.place, *(_scaled(detection, scale) for detection in pair))
                    for relation, pair in zip(asked, found, strict=True)
                ]
            )
        return scores


def _scaled(detection: Detection | None, scale: float) -> Detection | None:
    if detection is None:
        return None
    return Detection(detection.score, tuple(scale * edge for edge in detection.box))
