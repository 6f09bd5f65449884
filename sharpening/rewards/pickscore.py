"""PickScore: a CLIP trained on which of two images people picked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sharpening.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScoreReward:
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): a CLIP ViT-H trained on which of two images people picked.

    Range: exp(logit scale) x cosine, about 15 to 25. A difference of 1 between two images of one prompt means that
    people choose the better one with probability sigmoid(1) = 0.73. Prompts are cut at 77 tokens.

    Args:
        model: hub id or folder of a transformers CLIPModel (`pickscore:MODEL` in the spec). Tokenizer and image
            processor are read beside it, or, as its authors do, from laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if a part cannot be had.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        import torch
        from transformers import CLIPModel, CLIPProcessor

        self.device, self.dtype = torch.device(device), dtype or torch.float32
        folder = Path(model).expanduser()
        local = any((folder / f"{name}_config.json").is_file() for name in ("processor", "preprocessor"))
        try:
            self.clip = CLIPModel.from_pretrained(model, dtype=torch.float32, cache_dir=cache_dir)
            processor = CLIPProcessor.from_pretrained(model if local else PROCESSOR, cache_dir=cache_dir)
            if processor.tokenizer.vocab_size < 10:  # what transformers makes, without a word, when it finds no files
                raise OSError("its tokenizer has no vocabulary")
        except Exception as error:
            raise UserError(
                f"--reward_model pickscore:{model} could not be loaded ({first_line(error)}); check the name and the "
                "connection, or give a folder that holds the model, its tokenizer and its preprocessor_config.json"
            ) from error
        # In bfloat16 the published factor, 100, would become 98.9: read before the weights are rounded.
        self.scale = self.clip.logit_scale.detach().exp().to(self.device)
        self.clip.to(self.device, self.dtype).eval().requires_grad_(False)
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        import torch
        from torch.nn.functional import normalize

        from sharpening.rewards.preprocessing import in_slices, preprocess

        config = self.image_processor
        pixels = preprocess(images.to(self.device), config.crop_size["height"], config.image_mean, config.image_std)
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        with torch.autocast(self.device.type, enabled=False):
            image_features = in_slices(self._embed, pixels.to(self.dtype)).float()
            text_features = self.clip.get_text_features(**tokens.to(self.device)).pooler_output.float()
        cosine = (normalize(image_features, dim=-1) * normalize(text_features, dim=-1)).sum(dim=-1)
        return self.scale * cosine

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.clip.get_image_features(pixels).pooler_output
