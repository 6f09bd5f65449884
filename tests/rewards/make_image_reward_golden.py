"""Records what the original ImageReward package computes, for the tests of our implementation.

`python tests/rewards/make_image_reward_golden.py` makes an environment of its own with the package and what it needs
(several GB), runs itself there and writes `image_reward_golden.json` next to this file. The weights are seeded random
numbers.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

# The package pins timm and fairscale. It imports clip without declaring it, whose release imports `pkg_resources`,
# and names that transformers 4.56 removed.
REQUIREMENTS = (
    "image-reward==1.5",
    "timm==0.6.13",
    "fairscale==0.4.13",
    "openai-clip==1.0.1",
    "setuptools==69.5.1",
    "transformers==4.55.4",
    "huggingface_hub==0.34.4",
    "diffusers==0.35.2",
    "accelerate==1.10.1",
    "datasets==4.1.1",
    "torch==2.10.0",
    "torchvision==0.25.0",
    "numpy==2.4.6",
    "pillow==13.0.0",
)
RECORDED_VERSIONS = ("image-reward", "torch", "torchvision", "transformers", "timm", "numpy", "pillow")
ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path(__file__).with_name("image_reward_golden.json")
PAIRS = 16

MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 1024,
    "add_cross_attention": True,
}
TINY_VISION = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1, "drop_path_rate": 0.1}
TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 1,
    "num_hidden_layers": 2,
    "encoder_width": 64,
}
# What a prompt may spell out: the tokenizer takes these for the special tokens themselves.
SPELLED_SPECIALS = "a [ENC] cat [SEP] and [DEC] dog [MASK] [PAD] [UNK] [CLS] [enc]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "image-reward-oracle")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if Path(sys.prefix).resolve() == arguments.venv.resolve():
        arguments.output.write_text(to_json(record()), encoding="utf-8")
        return
    python = make_environment(arguments.venv)
    command = [python, __file__, "--venv", arguments.venv, "--output", arguments.output.resolve()]
    settings = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env={**os.environ, **settings})


def make_environment(folder: Path) -> Path:
    """Makes or completes the virtual environment and returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return python


def record() -> dict[str, Any]:
    """Everything that goes into the file; runs where the package is installed."""
    import torch

    torch.set_num_threads(1)
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in RECORDED_VERSIONS},
        "tiny": record_variant(tiny=True),
        "full": record_variant(tiny=False),
    }


def record_variant(tiny: bool) -> dict[str, Any]:
    """Builds one network, gives it seeded weights and records its inputs and scores."""
    import torch
    from PIL import Image

    from tests.support.image_reward_weights import PROMPTS, seeded_images, seeded_state_dict, vocabulary

    med_config = MED_CONFIG | TINY_TEXT | {"vocab_size": len(vocabulary()) + 2} if tiny else MED_CONFIG
    with tempfile.TemporaryDirectory() as folder, patched_package(Path(folder), tiny) as package:
        config_path = Path(folder) / "med_config.json"
        config_path.write_text(json.dumps(med_config))
        model = package.ImageReward(med_config=str(config_path), device="cpu").eval()
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    weights = {name: torch.from_numpy(array) for name, array in seeded_state_dict(shapes).items()}
    result = model.load_state_dict(weights, strict=False)
    kept = sorted(state.keys() - weights.keys())
    if sorted(result.missing_keys) != kept or result.unexpected_keys:
        raise RuntimeError(f"the weights do not fit: {result}")

    images = [Image.fromarray(array) for array in seeded_images(PAIRS)]
    tokens, pixels = [], []
    hooks = [
        model.blip.text_encoder.register_forward_pre_hook(
            lambda _, args, kwargs: tokens.append((args[0], kwargs["attention_mask"])), with_kwargs=True
        ),
        model.blip.visual_encoder.register_forward_pre_hook(lambda _, args: pixels.append(args[0])),
    ]
    with torch.no_grad():
        scores = [model.score(prompt, image) for prompt, image in zip(PROMPTS, images, strict=True)]
        for hook in hooks:
            hook.remove()
        by_prompt = [model.score(prompt, images[0]) for prompt in PROMPTS]
        by_image = model.inference_rank(PROMPTS[0], images)[1]
    unused = without_gradient(model, tokens[0], pixels[0])
    tokenizer = model.blip.tokenizer
    specials = tokenizer(SPELLED_SPECIALS, padding="max_length", truncation=True, max_length=35)
    return {
        "score_mean": model.mean,
        "score_std": model.std,
        "head": [str(layer) for layer in model.mlp.layers],
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "length": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "enc_token_id": tokenizer.enc_token_id,
        },
        "word_embeddings": len(model.blip.text_encoder.embeddings.word_embeddings.weight),
        "med_config": med_config,
        "effective_encoder_width": model.blip.text_encoder.config.encoder_width,
        "keys_without_effect": unused,
        "scores": scores,
        "scores_of_image_0_by_prompt": by_prompt,
        "scores_of_prompt_0_by_image": by_image,
        "pixel_mean_and_std": [[p.double().mean().item(), p.double().std(correction=0).item()] for p in pixels],
        "input_ids": [ids[0].tolist() for ids, _ in tokens],
        "attention_mask": [mask[0].tolist() for _, mask in tokens],
        "spelled_specials": {"prompt": SPELLED_SPECIALS, "input_ids": specials.input_ids},
        "state_dict": {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in state.items()},
    }


@contextmanager
def patched_package(folder: Path, tiny: bool) -> Iterator[SimpleNamespace]:
    """The module of the package, with its tokenizer's vocabulary ours and, if `tiny`, its sizes small."""
    from tests.support.image_reward_weights import write_vocab

    importlib.import_module("ImageReward")
    package = sys.modules["ImageReward.ImageReward"]  # the attribute of that name is the class
    blip = sys.modules["ImageReward.models.BLIP.blip"]
    blip_pretrain = sys.modules["ImageReward.models.BLIP.blip_pretrain"]
    write_vocab(folder / "vocab.txt")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    from_pretrained = blip.BertTokenizer.from_pretrained

    def local_tokenizer(name: str) -> Any:
        if name != "bert-base-uncased":
            raise RuntimeError(f"the package asks for the tokenizer {name}")
        return from_pretrained(str(folder))

    def tiny_vit(vit: str, image_size: int, *_: Any) -> tuple[Any, int]:
        return blip.VisionTransformer(img_size=image_size, **TINY_VISION), TINY_VISION["embed_dim"]

    original_mlp = package.MLP
    with mock.patch.object(blip.BertTokenizer, "from_pretrained", local_tokenizer):
        if tiny:
            with (
                mock.patch.object(blip_pretrain, "create_vit", tiny_vit),
                mock.patch.object(package, "MLP", lambda _: original_mlp(TINY_TEXT["hidden_size"])),
            ):
                yield package
        else:
            yield package


def without_gradient(model: Any, tokens: tuple[Any, Any], pixels: Any) -> list[str]:
    """The parameters that a score does not depend on."""
    model.score_gard(*tokens, pixels).sum().backward()
    names = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.zero_grad(set_to_none=True)
    return names


def to_json(recorded: dict[str, Any]) -> str:
    """JSON with a line for each entry of a variant, and for each element of an entry that has elements of its own."""

    def is_nested(value: Any) -> bool:
        elements = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return any(isinstance(element, dict | list) for element in elements)

    def lines(value: Any, depth: int) -> str:
        if not is_nested(value):
            return json.dumps(value)
        if isinstance(value, dict):
            entries = [f"{json.dumps(key)}: {lines(element, depth + 1)}" for key, element in value.items()]
        else:
            entries = [lines(element, depth + 1) for element in value]
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        indent = "\n" + " " * depth
        return opening + f"{indent} " + f",{indent} ".join(entries) + indent + closing

    return lines(recorded, 0) + "\n"


if __name__ == "__main__":
    main()
