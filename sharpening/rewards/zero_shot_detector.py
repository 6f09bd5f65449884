"""Detectors that are told in words what to look for: Grounding DINO and OWLv2, of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sharpening.errors import UserError, first_line
from sharpening.rewards.checkpoint_files import find_pretrained
from sharpening.rewards.preprocessing import in_slices
from sharpening.rewards.spatial_relation import Detection

IMAGES_PER_FORWARD = 8  # also on a GPU: an image is resized to 800 or 960 px, whatever its size

Pair = tuple[str, str]
Found = tuple[Detection | None, Detection | None]


class ZeroShotDetector(ABC):
    """A detector of two things at once, frozen, with its tokenizer and preprocessing; `load_detector` makes one.

    Both things are asked for in one forward, and a box belongs to the one that it fits better: asked for alone, such a
    detector also takes a dog for the cat that is not there.

    Args:
        flag: what the user wrote, for error messages.
        model: hub id or folder of the network and its processor.
        threshold: the score above which it reports a box; None is `default_threshold`.
        device: where it runs.
        dtype: of weights and activations; None is float32.
        cache_dir: where downloads are kept.
    """

    default_threshold: float

    def __init__(
        self,
        flag: str,
        model: str,
        threshold: float | None,
        device: str | torch.device,
        dtype: torch.dtype | None,
        cache_dir: str | None,
    ) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self.threshold = self.default_threshold if threshold is None else threshold
        self.device, self.dtype = torch.device(device), dtype or torch.float32
        try:
            processor = AutoProcessor.from_pretrained(model, cache_dir=cache_dir)
            self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
            self.check_tokenizer()
            self.network, loading = AutoModelForZeroShotObjectDetection.from_pretrained(
                model, dtype=self.dtype, cache_dir=cache_dir, output_loading_info=True
            )
            if loading["missing_keys"]:  # transformers would leave them random
                raise OSError(
                    f"it lacks {len(loading['missing_keys'])} weights, {min(loading['missing_keys'])} for one"
                )
        except Exception as error:
            raise _not_loaded(flag, error) from error
        self.network.to(self.device).eval().requires_grad_(False)

    @abstractmethod
    def check_tokenizer(self) -> None:
        """Raise `OSError` if the tokenizer is not the network's: transformers makes an empty one without a word."""

    @abstractmethod
    def words(self, pairs: list[Pair]) -> tuple[Tensor, ...]:
        """What `look` wants to know of B pairs of things, as tensors of B rows."""

    @abstractmethod
    def look(self, pixels: Tensor, *words: Tensor) -> tuple[Tensor, Tensor]:
        """For Q boxes, the scores of both things `(B, 2, Q)` float32, and centre, width and height `(B, Q, 4)`."""

    @abstractmethod
    def extent(self, height: int, width: int) -> tuple[int, int]:
        """What boxes are a share of, `(width, height)` in px, for images of a size."""

    def detect(self, images: Tensor, pairs: list[Pair]) -> list[Found]:
        """The best detection of each of two things in each image, or None where none is above the threshold.

        If both things of a pair are the same, so are their detections.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            pairs: what to look for in each of them.

        Returns:
            B pairs; boxes are in px of the images, within them.
        """
        height, width = images.shape[2:]
        images = images.to(self.device, torch.float32)
        pixels = self.image_processor(list(images), do_rescale=False, return_tensors="pt").pixel_values
        words = [part.to(self.device) for part in self.words(pairs)]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            best = in_slices(self._best, pixels.to(self.dtype), *words, most=IMAGES_PER_FORWARD).cpu()  # (B, 2, 5)
        scores, centres, sizes = best.split([1, 2, 2], dim=-1)
        corners = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=-1) * torch.tensor(
            self.extent(height, width) * 2
        )
        corners = corners.clamp(min=torch.zeros(4), max=torch.tensor([width, height] * 2))
        return [
            tuple(
                Detection(score, tuple(box)) if score > self.threshold else None
                for score, box in zip(row_scores, row_corners, strict=True)
            )
            for row_scores, row_corners in zip(scores.squeeze(-1).tolist(), corners.tolist(), strict=True)
        ]

    def _best(self, pixels: Tensor, *words: Tensor) -> Tensor:
        """Score, centre, width and height of the best box of each thing, `(B, 2, 5)`."""
        scores, boxes = self.look(pixels, *words)
        own = scores == scores.amax(dim=1, keepdim=True)
        scores, index = scores.where(own, 0).max(dim=2)  # (B, 2)
        boxes = boxes.float().gather(1, index[:, :, None].expand(-1, -1, 4))
        return torch.cat([scores[:, :, None], boxes], dim=-1)


class GroundingDINO(ZeroShotDetector):
    """Grounding DINO (Liu et al. 2023, arXiv 2303.05499).

    It reads both things as one text, "coat rack. umbrella."; the score of a box for a thing is the largest of its
    scores for the thing's tokens. The threshold is that of its authors' demonstration.
    """

    default_threshold = 0.35

    def check_tokenizer(self) -> None:
        from transformers.models.grounding_dino.modeling_grounding_dino import SPECIAL_TOKENS

        if self.tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"]) != SPECIAL_TOKENS:
            raise OSError("its tokenizer is not that of BERT, whose signs part the things that it is asked for")

    def words(self, pairs: list[Pair]) -> tuple[Tensor, ...]:
        texts = [f"{first}. {second}." for first, second in pairs]
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.network.config.max_text_len, return_tensors="pt",
            return_offsets_mapping=True,
        )  # fmt: skip
        starts, ends = tokens.offset_mapping[:, None].unbind(dim=-1)  # (B, 1, L), within the text; both 0: a sign
        begin = torch.tensor([[0, len(first) + 2] for first, _ in pairs])[:, :, None]  # (B, 2, 1), of each thing
        length = torch.tensor([[len(thing) for thing in pair] for pair in pairs])[:, :, None]
        of_thing = (starts >= begin) & (ends <= begin + length) & (ends > starts)
        return tokens.input_ids, tokens.attention_mask, of_thing

    def look(self, pixels: Tensor, *words: Tensor) -> tuple[Tensor, Tensor]:
        input_ids, attention_mask, of_thing = words  # (B, L), (B, L), (B, 2, L)
        output = self.network(pixels, input_ids, attention_mask=attention_mask)
        scores = output.logits[:, :, : input_ids.shape[1]].float().sigmoid()  # (B, Q, L)
        scores = scores.unsqueeze(1).where(of_thing[:, :, None], 0).amax(dim=-1)
        return scores, output.pred_boxes

    def extent(self, height: int, width: int) -> tuple[int, int]:
        return width, height


class OWLv2(ZeroShotDetector):
    """OWLv2 (Minderer et al. 2023, arXiv 2306.09683), asked for "a photo of a coat rack".

    The threshold is the one that transformers proposes.
    """

    default_threshold = 0.1

    def check_tokenizer(self) -> None:
        if self.tokenizer.vocab_size < 10:
            raise OSError("its tokenizer has no vocabulary")

    def words(self, pairs: list[Pair]) -> tuple[Tensor, ...]:
        tokens = self.tokenizer(
            [f"a photo of a {thing}" for pair in pairs for thing in pair], padding="max_length", truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings, return_tensors="pt",
        )  # fmt: skip
        return tokens.input_ids.unflatten(0, (-1, 2)), tokens.attention_mask.unflatten(0, (-1, 2))

    def look(self, pixels: Tensor, *words: Tensor) -> tuple[Tensor, Tensor]:
        input_ids, attention_mask = (part.flatten(0, 1) for part in words)  # (2 B, L)
        output = self.network(input_ids=input_ids, pixel_values=pixels, attention_mask=attention_mask)
        return output.logits.float().sigmoid().transpose(1, 2), output.pred_boxes

    def extent(self, height: int, width: int) -> tuple[int, int]:
        return max(height, width), max(height, width)  # it pads images to squares, below and to the right


KINDS = {"grounding-dino": GroundingDINO, "owlv2": OWLv2}


def load_detector(
    flag: str,
    model: str,
    threshold: float | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
    cache_dir: str | None,
) -> ZeroShotDetector:
    """The detector that a hub id or folder holds; arguments as of ZeroShotDetector.

    Raises:
        UserError: naming `flag`, if a part cannot be had or does not fit; what is cheap to read is checked first.
    """
    model = find_pretrained(
        flag, model, KINDS, "a Grounding DINO or OWLv2", "GroundingDinoForObjectDetection or Owlv2ForObjectDetection"
    )
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(model, cache_dir=cache_dir).model_type
        if kind not in KINDS:
            raise OSError(f"it is a {kind}")
    except Exception as error:
        raise _not_loaded(flag, error) from error
    return KINDS[kind](flag, model, threshold, device, dtype, cache_dir)


def _not_loaded(flag: str, error: Exception) -> UserError:
    return UserError(
        f"{flag} could not be loaded ({first_line(error)}); check the name and the connection, or give a folder that "
        "holds a Grounding DINO or OWLv2, its tokenizer and its preprocessor_config.json"
    )
