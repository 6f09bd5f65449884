"""Build a tiny SDXL out of the real pipeline classes: with random weights for tests, or trained on the shapes world.

    python tiny_world/make_tiny_sdxl.py --output_dir outputs/random_sdxl --random

    python tiny_world/make_shapes_dataset.py --output_dir outputs/shapes_wrong --num_images 8000 --size 32 \
        --wrong_fraction 0.4 --captions all
    python tiny_world/make_tiny_sdxl.py --output_dir outputs/tiny_sdxl --dataset outputs/shapes_wrong

The second pair remakes the copy kept in `tiny_world/sdxl`. Its captions are wrong for 40% of the images, so that it
draws well and follows prompts badly: that is the room in which sharpening is studied. It is trained as any latent
diffusion model is, by plain diffusers code: the VAE, then the UNet on its latents; the text encoders stay random,
which suffices to tell 54 captions apart.
"""

import argparse
import copy
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sharpening.errors import UserError
from tiny_world.shapes import BACKGROUNDS, COLOURS, SHAPES, all_captions, draw, score

SIZE = 32  # pixels; the VAE halves this twice, so the UNet works on 8 x 8 latents
WORDS = ("a", "on", "background", *COLOURS, *SHAPES, *BACKGROUNDS)
SETTINGS = {"force_zeros_for_empty_prompt": True, "add_watermarker": False}  # the first as SDXL base has it


# ---------------------------------------------------------------------------------------------------- the parts


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


def make_tokenizer(pad_token: str) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the grammar is one token and any other text falls into bytes."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
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


def make_pipeline(seed: int = 0, small: bool = True, prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    """A random-weight SDXL on 32 px images, float32: UNet of 0.26M parameters if `small`, else the 2.6M to be trained.

    Both have SDXL's structure: two text encoders whose penultimate features are concatenated, pooled features and time
    ids added to the time embedding, cross attention on the way down, in the middle and on the way up.
    """
    widths = {"text": (16, 16), "unet": (16, 32), "vae": (8, 16, 16), "groups": 8, "head": 8}
    if not small:
        widths = {"text": (64, 64), "unet": (64, 96), "vae": (16, 32, 32), "groups": 16, "head": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = make_tokenizer("<|endoftext|>"), make_tokenizer("!")
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


def build_random_sdxl(path: str | Path, seed: int = 0, small: bool = True, prediction_type: str = "epsilon") -> None:
    """Save a random-weight tiny SDXL (see `make_pipeline`) as a pipeline folder at `path`, in about a second."""
    make_pipeline(seed, small, prediction_type).save_pretrained(path)


# ------------------------------------------------------------------------------------------------- the training


def load_image_folder(folder: str | Path) -> tuple[torch.Tensor, list[str]]:
    """Images `(N, 3, 32, 32)` in [-1, 1] and their captions, from a folder with `metadata.jsonl`."""
    folder = Path(folder)
    try:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"--dataset {folder} has no readable metadata.jsonl; make one with tiny_world/make_shapes_dataset.py."
        ) from error
    rows = [json.loads(line) for line in lines]
    pixels = np.empty((len(rows), SIZE, SIZE, 3), dtype=np.uint8)
    for i, row in enumerate(tqdm(rows, desc="images", mininterval=1.0)):
        with Image.open(folder / row["file_name"]) as image:
            if image.size != (SIZE, SIZE):
                raise UserError(
                    f"--dataset {folder} must hold images of {SIZE} x {SIZE} px; remake it with --size {SIZE}."
                )
            pixels[i] = np.asarray(image.convert("RGB"))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return images.contiguous(), [row["text"] for row in rows]


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: a linear rise over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup)))


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, batch: int = 16) -> None:
    """Fit the autoencoder to `images` `(N, 3, 32, 32)` in [-1, 1].

    Squared error with some absolute error for crisp edges (much of it lets small figures fade at first), and a whisper
    of KL. Many small batches: it is the number of steps that teaches the colours.
    """
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, warmup=50))
    bar = tqdm(range(steps), desc="VAE", mininterval=1.0)
    for _ in bar:
        x = images[torch.randint(len(images), (batch,))]
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        error = F.mse_loss(reconstruction, x) + 0.1 * F.l1_loss(reconstruction, x)
        loss = error + 1e-6 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval()


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Posterior means `(N, 4, 8, 8)`, not yet scaled."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(256)])


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Give the latents zero mean per channel and, through `scaling_factor`, unit standard deviation.

    SDXL's pipeline has no latent mean by default, so it moves into the 1 x 1 convolutions on either side: `quant_conv`
    subtracts it and `post_quant_conv` adds its image back, which leaves every reconstruction as it was.
    """
    latents = encode_images(vae, images)
    mean = latents.mean(dim=(0, 2, 3))  # (4,)
    vae.quant_conv.bias[:4] -= mean  # the other four channels are log variances
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=round(1.0 / (latents - mean[:, None, None]).std().item(), 5))


@torch.no_grad()
def encode_captions(
    pipeline: StableDiffusionXLPipeline, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings `(K + 1, 77, D)` and pooled `(K + 1, P)` of K distinct captions, and each caption's row `(N,)`.

    The last row is zero: the empty prompt of a pipeline with `force_zeros_for_empty_prompt`, met by caption dropout.
    """
    distinct = sorted(set(captions))
    embeddings, _, pooled, _ = pipeline.encode_prompt(distinct, device="cpu", do_classifier_free_guidance=False)
    rows = torch.tensor([distinct.index(caption) for caption in captions])
    zero_row = (0, 0, 0, 0, 0, 1)  # pads one row of zeros after the last
    return F.pad(embeddings, zero_row), F.pad(pooled, zero_row[2:]), rows


def train_unet(
    pipeline: StableDiffusionXLPipeline, images: torch.Tensor, captions: list[str], steps: int, batch: int = 64
) -> None:
    """Fit the UNet to predict the noise on the images' latents; it ends holding its averaged weights."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    latents = encode_images(pipeline.vae, images) * pipeline.vae.config.scaling_factor  # (N, 4, 8, 8)
    embeddings, pooled, caption_row = encode_captions(pipeline, captions)
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32)  # original, crop, target
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, warmup=100))
    average = EMAModel(unet.parameters(), decay=0.995, use_ema_warmup=True, power=0.75)
    unet.train()
    bar = tqdm(range(steps), desc="UNet", mininterval=1.0)
    smooth = None
    for _ in bar:
        pick = torch.randint(len(latents), (batch,))
        x_0, row = latents[pick], caption_row[pick]
        row = torch.where(torch.rand(batch) < 0.1, len(embeddings) - 1, row)  # caption dropout, for guidance
        noise = torch.randn_like(x_0)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch,))
        conditions = {"text_embeds": pooled[row], "time_ids": time_ids.expand(batch, -1)}
        x_t = scheduler.add_noise(x_0, noise, t)
        predicted = unet(x_t, t, embeddings[row], added_cond_kwargs=conditions).sample
        loss = F.mse_loss(predicted, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}")
    average.copy_to(unet.parameters())
    unet.eval()


def round_to_half(module: torch.nn.Module) -> None:
    """Round weights to what float16 holds, kept in float32: what follows is fitted to the weights that are saved."""
    module.half().float()


def train_sdxl(
    dataset: str | Path, seed: int = 0, vae_steps: int = 1500, unet_steps: int = 2200
) -> StableDiffusionXLPipeline:
    """Train a tiny SDXL on an image folder of 32 px images; the same seed and thread count give the same weights."""
    images, captions = load_image_folder(dataset)
    pipeline = make_pipeline(seed, small=False)
    torch.manual_seed(seed)
    train_vae(pipeline.vae, images, vae_steps)
    standardise_latents(pipeline.vae, images)
    round_to_half(pipeline.vae)
    print(f"autoencoder: clean drawings score {reconstruction_score(pipeline.vae):.4f} after a round trip", flush=True)
    train_unet(pipeline, images, captions, unet_steps)
    round_to_half(pipeline.unet)
    return pipeline


# --------------------------------------------------------------------------------------------------- the figures


def sample(
    pipeline: StableDiffusionXLPipeline, captions: list[str], guidance_scale: float, steps: int = 25, seed: int = 0
) -> np.ndarray:
    """Images `(N, 32, 32, 3)` in [0, 1] of the captions, by the pipeline itself."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for start in tqdm(range(0, len(captions), 50), desc=f"guidance {guidance_scale:g}", mininterval=1.0):
        drawn.append(
            pipeline(
                captions[start : start + 50],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generator,
                output_type="np",
            ).images
        )
    return np.concatenate(drawn)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> np.ndarray:
    """Images `(N, 3, 32, 32)` in [-1, 1] through the autoencoder and back, as `(N, 32, 32, 3)` in [0, 1]."""
    decoded = torch.cat([vae.decode(vae.encode(chunk).latent_dist.mean).sample for chunk in images.split(256)])
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def reconstruction_score(vae: AutoencoderKL) -> float:
    """Mean score of fresh clean drawings of all captions after encoding and decoding."""
    rng = np.random.default_rng(0)
    captions = all_captions() * 2
    drawings = np.stack([np.asarray(draw(caption, rng, SIZE)) for caption in captions])
    images = torch.from_numpy(drawings).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return float(score(reconstruct(vae, images), captions).mean())


def write_grid(path: str | Path, images: np.ndarray, columns: int, scale: int = 2) -> None:
    """Save images `(N, H, W, 3)` in [0, 1] as one PNG of full rows, each pixel enlarged `scale` times."""
    rows = len(images) // columns
    _, height, width, _ = images.shape
    grid = images[: rows * columns].reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * height, columns * width, 3).repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray((grid * 255).round().astype(np.uint8)).save(path)


def report(pipeline: StableDiffusionXLPipeline, num_images: int = 400, grid: str | Path | None = None) -> None:
    """Print the mean score over all captions, without guidance and with a scale of 3; write both as one grid."""
    choices = all_captions()
    captions = [choices[i % len(choices)] for i in range(num_images)]
    grids = []
    for guidance_scale in (1.0, 3.0):  # SDXL's pipeline guides only above 1
        images = sample(pipeline, captions, guidance_scale)
        scores = score(images, captions)
        error = scores.std(ddof=1) / np.sqrt(num_images)
        print(f"guidance {guidance_scale:g}: score {scores.mean():.4f} +- {error:.4f} (s.e., {num_images} images)")
        grids.append(images[: len(choices)])
    if grid is not None:
        write_grid(grid, np.concatenate(grids), columns=18)


def save_pipeline(pipeline: StableDiffusionXLPipeline, output_dir: Path) -> None:
    """Save UNet and VAE as float16 safetensors, written aside and renamed: the folder is whole or absent.

    The text encoders, a seventh of the weights, stay float32: transformers loads them in the type they were saved in
    while diffusers loads its models in float32, and `from_pretrained` without a type must give a pipeline that runs.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    aside.chmod(0o755)
    try:
        # Half-precision copies are saved; the caller's pipeline stays in float32.
        halves = {"unet": copy.deepcopy(pipeline.unet).half(), "vae": copy.deepcopy(pipeline.vae).half()}
        StableDiffusionXLPipeline(**{**pipeline.components, **halves}, **SETTINGS).save_pretrained(aside)
        os.replace(aside, output_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of this command, checked."""
    parser = argparse.ArgumentParser(description="Build a tiny SDXL, random or trained on the shapes world.")
    parser.add_argument("--output_dir", type=Path, required=True, help="new or empty folder for the pipeline")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--random", action="store_true", help="save random weights and stop")
    source.add_argument("--dataset", metavar="DIR", help="train on this image folder of 32 px images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=1500)
    parser.add_argument("--unet_steps", type=int, default=2200)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number rounds sums differently")
    parser.add_argument("--grid", metavar="PNG", help="write sample images of all captions here")
    args = parser.parse_args(argv)
    for flag in ("vae_steps", "unet_steps", "threads"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1, not {getattr(args, flag)}.")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parse_args(argv)
    try:
        if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
            raise UserError(f"--output_dir {args.output_dir} already holds something; name a new or an empty folder.")
        if args.random:
            build_random_sdxl(args.output_dir, args.seed)
            return 0
        torch.set_num_threads(args.threads)
        started = time.perf_counter()
        pipeline = train_sdxl(args.dataset, args.seed, args.vae_steps, args.unet_steps)
        save_pipeline(pipeline, args.output_dir)
        megabytes = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file()) / 1e6
        print(f"{args.output_dir}: {megabytes:.2f} MB, trained in {time.perf_counter() - started:.0f} s")
        report(pipeline, grid=args.grid)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
