"""Checkpoints of the rewards with random weights, in the published sizes: they cost what the real ones cost."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
HPSV2, CLIP = "ViT-H-14", "ViT-L-14-quickgelu"  # open_clip's names of what the rewards are built on
BASE_BERT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def write_clip(folder: Path, architecture: str) -> Path:
    """A state dict of a model of open_clip."""
    import open_clip

    torch.save(open_clip.create_model(architecture).state_dict(), folder / "clip.pt")
    return folder / "clip.pt"


def write_aesthetic_head(folder: Path) -> Path:
    """The linear layers of the aesthetic predictor, for embeddings of 768 numbers."""
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    weights = {f"layers.{index}.weight": torch.randn(shape) for index, shape in sizes.items()}
    biases = {f"layers.{index}.bias": torch.randn(shape[0]) for index, shape in sizes.items()}
    torch.save(weights | biases, folder / "head.pth")
    return folder / "head.pth"


def write_pickscore(folder: Path) -> Path:
    """A folder with a CLIP ViT-H-14 of transformers and its processor; the vocabulary is that of the tiny SDXL."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "tiny_world" / "sdxl" / "tokenizer")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "vocab_size": len(tokenizer), "max_position_embeddings": 77, **ids,
    }  # fmt: skip
    vision = {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "patch_size": 14,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024))
    model.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    return folder


def write_image_reward(folder: Path, prompts: list[str]) -> Path:
    """A folder with an ImageReward checkpoint and a vocabulary that knows the words of the prompts."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    from sharpening.rewards.image_reward_network import ImageRewardNetwork

    vision = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
        patch_size=16,
    )  # fmt: skip
    text = BlipTextConfig(
        vocab_size=30524, encoder_hidden_size=1024, max_position_embeddings=512, is_decoder=True, **BASE_BERT
    )
    widths = (768, 1024, 128, 64, 16, 1)
    head = torch.nn.Sequential()
    for inner, outer in pairwise(widths):
        head.append(torch.nn.Linear(inner, outer))
        if outer > 16:  # where training has a dropout
            head.append(torch.nn.Identity())
    network = ImageRewardNetwork(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), head)
    torch.save(network.state_dict(), folder / "ImageReward.pt")
    words = dict.fromkeys(" ".join(prompts).replace(",", " ,").split())
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return folder
