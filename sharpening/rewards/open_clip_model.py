"""CLIP models of open_clip as reward models use them: unit embeddings of images and prompts."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sharpening.errors import UserError, did_you_mean, first_line
from sharpening.rewards.preprocessing import in_slices, preprocess


class OpenCLIP:
    """An open_clip model, frozen, with its tokenizer and preprocessing.

    Args:
        flag: what the user wrote, such as `--clip_model NAME`, for error messages.
        name: see `parse_name`; the docstring of `sharpening.rewards.clip.CLIPScoreReward` lists the forms for users.
        device: where it runs.
        dtype: of weights and activations, norms too; None is float32.
        cache_dir: where downloads are kept; None is open_clip's own choice.

    Raises:
        UserError: naming `flag`, if the model or its weights cannot be had.
    """

    def __init__(
        self, flag: str, name: str, device: str | torch.device, dtype: torch.dtype | None, cache_dir: str | None
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype or torch.float32
        # "pure": open_clip's plain "fp16" keeps norms in float32, with two casts of the activations at each of them.
        precision = {torch.float32: "fp32", torch.float16: "pure_fp16", torch.bfloat16: "pure_bf16"}[self.dtype]
        architecture, weights = parse_name(flag, name)
        # OpenAI's weights (and others) were trained with x * sigmoid(1.702 x) in place of GELU. open_clip only warns
        # when the architecture is built with the other one, so the table of published weights decides here.
        quick_gelu = bool(weights) and open_clip.get_pretrained_cfg(architecture, weights).get("quick_gelu", False)
        try:
            self.model = open_clip.create_model(
                architecture,
                pretrained=weights,
                precision=precision,
                device=self.device,
                force_quick_gelu=quick_gelu,
                cache_dir=cache_dir,
                require_pretrained=True,
            )
            self.tokenize = open_clip.get_tokenizer(architecture, cache_dir=cache_dir)
        except Exception as error:
            if weights and Path(weights).is_file():
                remedy = f"the file must be an open_clip state dict of {architecture}, not a TorchScript archive"
            else:
                remedy = (
                    "check the connection, or download the weights elsewhere and give their path, as "
                    "ViT-L-14-quickgelu/path/to/checkpoint.pt for OpenAI's, NAME/path/to/checkpoint.pt for others"
                )
            raise UserError(f"{flag} could not be loaded ({first_line(error)}); {remedy}") from error
        self.model.eval().requires_grad_(False)
        self.preprocessing = self.model.visual.preprocess_cfg

    def preprocess(self, images: Tensor, resize_mode: str | None = None) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] as the model wants them; `resize_mode` None is its own."""
        config = self.preprocessing
        return preprocess(
            images,
            config["size"],
            config["mean"],
            config["std"],
            resize_mode or config["resize_mode"],
            config["interpolation"],
            config["fill_color"] / 255,
        )

    def cosine(self, images: Tensor, prompts: list[str], resize_mode: str | None = None) -> Tensor:
        """Cosines `(B,)` float32 of images `(B, 3, H, W)` in [0, 1] and their prompts."""
        return (self.embed_images(images, resize_mode) * self.embed_prompts(prompts)).sum(dim=-1)

    def embed_images(self, images: Tensor, resize_mode: str | None = None) -> Tensor:
        """Unit embeddings `(B, D)` float32 of images `(B, 3, H, W)` in [0, 1]."""
        pixels = self.preprocess(images.to(self.device), resize_mode)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return normalize(in_slices(self.model.encode_image, pixels.to(self.dtype)).float(), dim=-1)

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Unit embeddings `(B, D)` float32; each distinct prompt is embedded once."""
        distinct = list(dict.fromkeys(prompts))  # the branches of one sample share their prompt
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        tokens = self.tokenize(distinct).to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            features = normalize(self.model.encode_text(tokens).float(), dim=-1)  # (distinct, D)
        return features[[row_of[prompt] for prompt in prompts]]


def parse_name(flag: str, name: str) -> tuple[str, str | None]:
    """open_clip's `(model name, pretrained)` for a name such as `ViT-H-14/laion2b_s32b_b79k`.

    A name without weights means OpenAI's where there are any, else the first that open_clip lists for it.
    """
    if name.startswith(("hf-hub:", "local-dir:")):
        return name, None
    architecture, _, weights = name.partition("/")
    known = open_clip.list_models()
    if architecture not in known:
        raise UserError(
            f"{flag} does not begin with a model that open_clip knows{did_you_mean(architecture, known)}; write "
            "NAME/WEIGHTS, such as ViT-L-14/openai or ViT-L-14-quickgelu/path/to/checkpoint.pt"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    weights = weights or ("openai" if "openai" in tags or not tags else tags[0])
    if open_clip.is_pretrained_cfg(architecture, weights):
        return architecture, weights
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(
            f"{flag}: {weights} is neither an existing file nor the name of weights for {architecture}; open_clip has "
            f"{', '.join(tags) or 'none for this model'}"
        )
    return architecture, str(path)
