"""Tiny random checkpoints of every reward's architecture, in the form in which the real ones are published."""

import json
from pathlib import Path

import torch

from tests.support.image_reward_weights import seeded_state_dict, vocabulary, write_vocab

TINY = "tiny-clip-for-tests"  # open_clip's name for the architecture of `write_clip`


def write_clip(folder):
    """Teach open_clip two architectures of three million weights; returns weights on disk, model and preprocessing."""
    import open_clip

    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    }
    (folder / f"{TINY}.json").write_text(json.dumps(config))
    (folder / f"{TINY}-quickgelu.json").write_text(json.dumps({**config, "quick_gelu": True}))
    open_clip.add_model_config(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _, preprocess = open_clip.create_model_and_transforms(TINY)
        # Random towers embed everything in nearly the same place: larger weights make the scores differ.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("weight") and parameter.ndim == 2 and "embedding" not in name:
                    parameter.mul_(4)
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt", model.eval(), preprocess


def clip_scores(model, preprocess, pictures, prompts):
    """100 x cosine of a model that `write_clip` made, with nothing but open_clip's own calls, one pair at a time."""
    import open_clip

    tokenize = open_clip.get_tokenizer(TINY)
    scores = []
    with torch.no_grad():
        for picture, prompt in zip(pictures, prompts, strict=True):
            image = model.encode_image(preprocess(picture)[None], normalize=True)
            text = model.encode_text(tokenize([prompt]), normalize=True)
            scores.append(100 * (image @ text.T).item())
    return torch.tensor(scores)


def forget_clip(folder):
    """Undo what `write_clip` taught open_clip."""
    import open_clip

    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    for name in (TINY, f"{TINY}-quickgelu"):
        open_clip.factory._MODEL_CONFIGS.pop(name)


def write_aesthetic_head(folder, width=32):
    """The aesthetic predictor's file, for embeddings of `width` numbers; the published one has 768."""
    generator = torch.Generator().manual_seed(0)
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    weights = {}
    for index, (rows, columns) in sizes.items():
        weights[f"layers.{index}.weight"] = torch.randn(rows, columns, generator=generator) * 2 / columns**0.5
        weights[f"layers.{index}.bias"] = torch.randn(rows, generator=generator)
    path = folder / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(weights, path)
    return path


def write_pickscore(folder, size="tiny"):
    """A folder with a random CLIPModel of transformers, "tiny" or, as ViT-H-14, "full", and its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(Path(__file__).parents[2] / "tiny_world" / "sdxl" / "tokenizer")
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, projection = {**tower, "patch_size": 32}, 32
    if size == "full":
        tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        vision, projection = {**vision, "patch_size": 14}, 1024
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 77, **ids}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(10)
    model.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    return folder


def write_blip_vqa(folder):
    """A folder with a random BlipForQuestionAnswering of 64 px and its processor."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    words = [*vocabulary(), "yes", "no"]
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tower, "image_size": 64, "patch_size": 32}
    # As in the published model, [DEC] and [ENC] are the last rows of the table and unknown to the tokenizer.
    text = {**tower, "vocab_size": len(words) + 2, "bos_token_id": len(words), "max_position_embeddings": 48}
    text |= {"pad_token_id": words.index("[PAD]"), "sep_token_id": words.index("[SEP]")}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))
    weights = seeded_state_dict({name: parameter.shape for name, parameter in model.named_parameters()})
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[words.index("yes")] -= 6  # these weights say yes to everything
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    BlipProcessor(BlipImageProcessor(), BertTokenizer.from_pretrained(str(folder))).save_pretrained(folder)
    return folder


def write_grounding_dino(folder):
    """A folder with a random GroundingDinoForObjectDetection that sees 96 px, and its processor.

    Its boxes are small and all over, its scores mostly high, and both depend on image and text.
    """
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    # [CLS], [SEP], the dot and the question mark have the ids of BERT, which are constants of the network's code.
    words = [f"[unused{index}]" for index in range(999)]
    words[0], words[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [chr(sign) for sign in range(33, 65)]
    known = set(words)
    words += [word for word in vocabulary() if word not in known]
    text = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        pad_token_id=0,
    )  # fmt: skip
    backbone = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=32, num_queries=20, encoder_layers=2, decoder_layers=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GroundingDinoForObjectDetection(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    image_processor = GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    GroundingDinoProcessor(image_processor, BertTokenizer.from_pretrained(str(folder))).save_pretrained(folder)
    return folder


def write_owlv2(folder):
    """A folder with a random Owlv2ForObjectDetection of 64 px and its processor; its boxes are large and all over."""
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    tokenizer = CLIPTokenizer.from_pretrained(
        Path(__file__).parents[2] / "tiny_world" / "sdxl" / "tokenizer", model_max_length=16
    )
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = {**tower, "image_size": 64, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=32))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(("box_head", "class_head.logit")):
                    parameter.mul_(0.2)
                elif parameter.ndim == 2 and name.startswith("owlv2"):
                    parameter.mul_(10 if "text_model" in name else 3)
    model.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    Owlv2Processor(Owlv2ImageProcessor(size=size), tokenizer).save_pretrained(folder)
    return folder


def write_image_reward(folder, variant=0):
    """`ImageReward.pt` and `vocab.txt`, with the keys of the real package; variants have weights of their own."""
    weights = image_reward_weights("tiny")
    weights["mlp.layers.0.weight"] = weights["mlp.layers.0.weight"].roll(variant, 1)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "ImageReward.pt")
    write_vocab(folder / "vocab.txt")
    return folder / "ImageReward.pt"


def image_reward_weights(size):
    """The state dict of the real package's "tiny" or "full" model, with the seeded weights that it scored."""
    entries = golden_image_reward()[size]["state_dict"].items()
    arrays = seeded_state_dict({name: shape for name, (dtype, shape) in entries if dtype == "float32"})
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def golden_image_reward():
    """Keys, tokens and scores of the real package, as `make_image_reward_golden.py` recorded them."""
    return json.loads((Path(__file__).parents[1] / "rewards" / "image_reward_golden.json").read_text())
