"""A tiny SDXL of the real pipeline classes, with random weights: its tokenizers, its parts, and its folder on disk."""

import copy
import itertools
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sharpening.files import write_aside
from tiny_world.worlds import WORLDS

SIZE = 32  # pixels; the VAE halves this twice, so the UNet works on 8 x 8 latents
SETTINGS = {"force_zeros_for_empty_prompt": True, "add_watermarker": False}  # the first as SDXL base has it


def _byte_characters() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, printable bytes first, as CLIP's vocabulary orders them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + i) for i in range(256 - len(printable))]
    return [chr(byte) for byte in printable] + others


def _apply_merges(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The pieces that BPE leaves of a word: its earliest merge first, until none applies."""
    rank = {pair: i for i, pair in enumerate(merges)}
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        known = [(rank[pair], i) for i, pair in enumerate(itertools.pairwise(pieces)) if pair in rank]
        if not known:
            break
        _, i = min(known)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def make_tokenizer(pad_token: str, world: str = "shapes") -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of a world is one token and any other text falls into bytes."""
    merges: list[tuple[str, str]] = []
    for word in WORLDS[world].words:
        # A new merge ranks last, so it cannot take a piece away from a word that is whole already.
        while len(pieces := _apply_merges(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    characters = _byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]  # last, as in CLIP
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=77)


def text_config(tokenizer: CLIPTokenizer, width: int, heads: int, activation: str) -> CLIPTextConfig:
    """The config of a text encoder of two layers for a tokenizer of this project."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        max_position_embeddings=77,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _scale_up(text_encoder: CLIPTextModel | CLIPTextModelWithProjection) -> None:
    """Bring random features to the size of trained ones.

    CLIP initialises its embeddings at a standard deviation of 0.02 and SDXL reads the last layer but one, which no
    layer norm follows: left so, the prompt would hardly be heard. Positions stay smaller: the words matter more.
    """
    with torch.no_grad():
        for name, weight in text_encoder.named_parameters():
            if "token_embedding" in name:
                weight.normal_(std=1.0)
            elif "position_embedding" in name:
                weight.normal_(std=0.3)
            elif name.endswith("text_projection.weight"):
                weight.normal_(std=weight.shape[1] ** -0.5)


def make_pipeline(
    seed: int = 0, small: bool = True, prediction_type: str = "epsilon", world: str = "shapes"
) -> StableDiffusionXLPipeline:
    """A random-weight SDXL on 32 px images, float32: UNet of 0.26M parameters if `small`, else the 2.6M to be trained.

    Both have SDXL's structure: two text encoders whose penultimate features are concatenated, pooled features and time
    ids added to the time embedding, cross attention on the way down, in the middle and on the way up.
    """
    widths = {"text": (16, 16), "unet": (16, 32), "vae": (8, 16, 16), "groups": 8, "head": 8}
    if not small:
        widths = {"text": (64, 64), "unet": (64, 96), "vae": (16, 32, 32), "groups": 16, "head": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = make_tokenizer("<|endoftext|>", world), make_tokenizer("!", world)
        first, second = widths["text"]
        text_encoder = CLIPTextModel(text_config(tokenizer, first, 2, "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(text_config(tokenizer_2, second, 2, "gelu"))
        _scale_up(text_encoder)
        _scale_up(text_encoder_2)
        time_width = 8  # each of the six time ids becomes this many features
        unet = UNet2DConditionModel(
            sample_size=SIZE // 4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=widths["unet"],
            layers_per_block=1,
            transformer_layers_per_block=1,
            # In spite of its name, this is the number of heads.
            attention_head_dim=tuple(width // widths["head"] for width in widths["unet"]),
            norm_num_groups=widths["groups"],
            cross_attention_dim=first + second,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=6 * time_width + second,
        )
        blocks = len(widths["vae"])
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=widths["vae"],
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=SIZE,
            scaling_factor=1.0,
        )
    scheduler = DDIMScheduler(  # the noise schedule of SDXL base
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        **SETTINGS,
    )
    for part in (vae, text_encoder, text_encoder_2, unet):
        part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_random_sdxl(
    path: str | Path, seed: int = 0, small: bool = True, prediction_type: str = "epsilon", world: str = "shapes"
) -> None:
    """Save a random-weight tiny SDXL (see `make_pipeline`) as a pipeline folder at `path`, in about a second."""
    make_pipeline(seed, small, prediction_type, world).save_pretrained(path)


def save_pipeline(pipeline: StableDiffusionXLPipeline, output_dir: Path) -> None:
    """Save UNet and VAE as float16 safetensors, in a folder that is whole or absent.

    The text encoders, a seventh of the weights, stay float32: transformers loads them in the type they were saved in
    while diffusers loads its models in float32, and `from_pretrained` without a type must give a pipeline that runs.
    """
    # Half-precision copies are saved; the caller's pipeline stays in float32.
    halves = {"unet": copy.deepcopy(pipeline.unet).half(), "vae": copy.deepcopy(pipeline.vae).half()}
    with write_aside(output_dir) as aside:
        StableDiffusionXLPipeline(**{**pipeline.components, **halves}, **SETTINGS).save_pretrained(aside)
