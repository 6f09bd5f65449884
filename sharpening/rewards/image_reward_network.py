"""The network of ImageReward (Xu et al. 2023, arXiv 2304.05977) for inference, on transformers' BLIP parts.

A ViT reads the image, a BERT whose layers cross-attend to it reads the prompt, and linear layers turn the feature of
its first token into one number. IterComp's compositional rewards (arXiv 2410.07171) have the same architecture.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from sharpening.errors import UserError
from sharpening.rewards.checkpoint_files import find_checkpoint, read_state_dict
from sharpening.rewards.preprocessing import in_slices, preprocess

# Mean and standard deviation of the raw scores on the training prompts, as published with the weights.
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
VOCABULARY = "google-bert/bert-base-uncased"
HEAD_WIDTH = 64  # of an attention head, in both towers and in every published size

# Left: name in a published checkpoint. Right: name in this module.
_RENAMED = [
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"blip\.text_encoder\.", "text."),
    (r"mlp\.layers\.", "head."),
]
# The contrastive projections of BLIP's pretraining, which no score uses, and a buffer that older versions saved.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")


class ImageRewardNetwork(nn.Module):
    """Normalized scores `(B,)` from pixels and tokens.

    Made by `from_state_dict`; all sizes are read off the weights.
    """

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Sequential) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    @classmethod
    def from_state_dict(cls, published: Mapping[str, Tensor]) -> "ImageRewardNetwork":
        """The network with the weights of a published checkpoint, which may carry the prefix that DDP adds.

        Raises:
            ValueError: naming the keys, if any is missing, unexpected or of another shape.
        """
        published = {name.removeprefix("module."): tensor for name, tensor in published.items()}
        weights = {_rename(name): tensor for name, tensor in published.items() if not _UNUSED.fullmatch(name)}
        try:
            with torch.device("meta"):  # no memory and no random initialization for what is replaced at once
                network = cls._of_the_sizes_in(weights)
        except KeyError as error:
            raise ValueError(f"the key of {error.args[0]} is missing") from error
        wanted = network.state_dict()
        problems = {
            "missing": sorted(wanted.keys() - weights.keys()),
            "unexpected": sorted(weights.keys() - wanted.keys()),
            "wrongly shaped": sorted(k for k in wanted.keys() & weights.keys() if wanted[k].shape != weights[k].shape),
        }
        found = [f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in problems.items() if names]
        if found:
            raise ValueError("keys do not fit (" + "; ".join(found) + ")")
        network.load_state_dict(weights, assign=True)
        positions = torch.arange(weights["text.embeddings.position_embeddings.weight"].shape[0])
        network.text.embeddings.position_ids = positions[None]  # a buffer that checkpoints do not hold
        return network.eval().requires_grad_(False)

    @classmethod
    def _of_the_sizes_in(cls, weights: Mapping[str, Tensor]) -> "ImageRewardNetwork":
        width, _, patch, _ = weights["vision.embeddings.patch_embedding.weight"].shape
        patches = weights["vision.embeddings.position_embedding"].shape[1] - 1
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(weights["vision.encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=_count(weights, "vision.encoder.layers."),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=round(patches**0.5) * patch,
            patch_size=patch,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        vocabulary, text_width = weights["text.embeddings.word_embeddings.weight"].shape
        text = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=len(weights["text.encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=_count(weights, "text.encoder.layer."),
            num_attention_heads=text_width // HEAD_WIDTH,
            max_position_embeddings=len(weights["text.embeddings.position_embeddings.weight"]),
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            is_decoder=True,  # which is what gives its layers cross-attention; no mask is causal here
        )
        return cls(
            BlipVisionModel(vision),
            BlipTextModel(text, add_pooling_layer=False),
            linear_head({name.removeprefix("head."): w for name, w in weights.items() if name.startswith("head.")}),
        )

    @property
    def image_size(self) -> int:
        return self.vision.config.image_size

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores `(B,)` float32 of normalized pixels `(B, 3, S, S)` and tokens `(B, L)` with their mask."""
        image_features = self.vision(pixels).last_hidden_state  # (B, patches + 1, D)
        features = self.text(
            input_ids, attention_mask=attention_mask, encoder_hidden_states=image_features
        ).last_hidden_state[:, 0]
        raw = self.head(features.to(self.head[0].weight.dtype)).squeeze(1).float()
        return (raw - SCORE_MEAN) / SCORE_STD


def linear_head(weights: Mapping[str, Tensor]) -> nn.Sequential:
    """The linear layers, without activations, that `weights` (`0.weight`, `0.bias`, `2.weight`, ...) are of.

    The numbers between are the dropouts of training. The aesthetic predictor's head is of this form too.
    """
    head = nn.Sequential()
    for index in range(1 + max(int(name.partition(".")[0]) for name in weights)):
        shape = weights[f"{index}.weight"].shape if f"{index}.weight" in weights else None
        head.append(nn.Linear(shape[1], shape[0]) if shape else nn.Identity())
    return head


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMED:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return name


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


class ImageRewardScorer:
    """A checkpoint of this architecture, with its tokenizer and preprocessing, on a device.

    Args:
        flag: what the user wrote, for error messages.
        name: see `sharpening.rewards.checkpoint_files.find_checkpoint`; the published file is `ImageReward.pt`.
        device: where it runs.
        dtype: of the transformers' weights and activations; None is float32, which the head always has.
        cache_dir: where downloads are kept.

    Raises:
        UserError: naming `flag`, if the checkpoint or the vocabulary cannot be had or does not fit.
    """

    def __init__(
        self, flag: str, name: str, device: str | torch.device, dtype: torch.dtype | None, cache_dir: str | None
    ) -> None:
        path = find_checkpoint(flag, name, "ImageReward.pt", cache_dir)
        try:
            self.network = ImageRewardNetwork.from_state_dict(read_state_dict(flag, path))
        except ValueError as error:
            raise UserError(
                f"{flag}: {path} is no checkpoint of ImageReward's architecture: {error}; give the published "
                "ImageReward.pt, or one trained by its scripts"
            ) from error
        vocabulary = path.with_name("vocab.txt")
        if not vocabulary.is_file():
            vocabulary = find_checkpoint(f"{flag} (or put a vocab.txt beside it)", VOCABULARY, "vocab.txt", cache_dir)
        # BLIP's own two tokens only matter to a prompt that spells them out, and to the size of the table.
        self.tokenizer = BertTokenizer.from_pretrained(
            str(vocabulary.parent), bos_token="[DEC]", additional_special_tokens=["[ENC]"]
        )
        rows = self.network.text.config.vocab_size
        if len(self.tokenizer) > rows:
            raise UserError(
                f"{flag}: {path} knows {rows} tokens and the vocabulary of {vocabulary} has {len(self.tokenizer)}; "
                "put the vocab.txt it was trained with beside it"
            )
        self.device, self.dtype = torch.device(device), dtype or torch.float32
        self.network.to(self.device, self.dtype).head.float()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Normalized scores `(B,)` float32 of images `(B, 3, H, W)` in [0, 1]."""
        pixels = preprocess(images.to(self.device), self.network.image_size)
        # The authors pad every prompt to 35 tokens; the mask hides what is padded, so the longest of a batch will do.
        tokens = self.tokenizer(
            prompts, padding="longest", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return in_slices(self.network, pixels.to(self.dtype), tokens.input_ids, tokens.attention_mask)
