"""CLIP as a judge: how well image and prompt agree, with the scale of CLIPScore or of T2I-CompBench."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharpening.flags import Flag

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT_MODEL = "ViT-L-14/openai"
FLAGS = (
    Flag(
        "clip_model",
        "model of the clip reward, e.g. ViT-H-14/laion2b_s32b_b79k; see sharpening/rewards/clip.py; "
        f"unset: {DEFAULT_MODEL}",
    ),
)


class CLIPScoreReward:
    """100 x the cosine of the CLIP embeddings of image and prompt (Radford et al. 2021, arXiv 2103.00020).

    Range: [-100, 100]; 15 to 35 for most pairs of photograph and caption with the default model. Prompts are cut at
    the model's context, 77 tokens. Images go through the resize, crop and normalization that the weights were
    published with, done on tensors: at 224 px a score equals open_clip's own; at other sizes it differs by the
    rounding and clipping to 8 bits that PIL's resize adds (0.02 on white noise at 512 px, random ViT-B-32).

    Args:
        model: which model and weights (`--clip_model`, or `clip:MODEL` in the spec), one of

            - `ViT-L-14/openai` (the default): open_clip's name of the architecture, a slash, and the name of weights
              that open_clip can download; `ViT-H-14` alone means OpenAI's weights, or the first that it lists;
            - `ViT-L-14/path/to/checkpoint.pt`: the weights are a local file (.pt, .bin or .safetensors of an
              open_clip state dict; an absolute path gives two slashes). A file does not say which activation
              it was trained with: for OpenAI's weights and all that descend from them write
              `ViT-L-14-quickgelu/path/...`, or every score is quietly wrong. Named weights need no such care;
            - `hf-hub:organization/name` or `local-dir:path/to/folder`: a repository or folder that open_clip
              can read (`open_clip_config.json` beside the weights).
        device: where the model runs.
        dtype: of the weights and activations (`--reward_dtype`); None is float32. In float32 an image scores the same
            alone and in any batch to 1e-4; half precision keeps two to three digits. Scores are float32 in any case.
        cache_dir: where downloads are kept (`--cache_dir`); None is open_clip's own choice.

    Raises:
        UserError: naming the flag, if the model or its weights cannot be had.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.open_clip_model import OpenCLIP

        self.clip = OpenCLIP(f"--clip_model {model}", model, device, dtype, cache_dir)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 100 * self.clip.cosine(images, prompts)


class CLIPNonSpatialReward:
    """T2I-CompBench's score of non-spatial relations (Huang et al. 2023, arXiv 2307.06350): CLIPScore of ViT-B/32.

    Range: a cosine, [-1, 1], as the benchmark's tables print it; about 0.3 for prompts of that set. It is
    `clip:ViT-B-32` without the factor 100. The benchmark runs CLIP in half precision on a GPU and refuses a prompt of
    more than 77 tokens; here it is float32, and the prompt is cut.

    Args:
        model: as for CLIPScoreReward (`clip_non_spatial:MODEL` in the spec).
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if the model or its weights cannot be had.
    """

    def __init__(
        self,
        model: str = "ViT-B-32/openai",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.open_clip_model import OpenCLIP

        self.clip = OpenCLIP(f"--reward_model clip_non_spatial:{model}", model, device, dtype, cache_dir)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.clip.cosine(images, prompts)
