"""Build a tiny SDXL out of the real pipeline classes: with random weights for tests, or trained on a tiny world.

    python tiny_world/make_tiny_sdxl.py --output_dir outputs/random_sdxl --random

    python tiny_world/make_shapes_dataset.py --output_dir outputs/shapes_wrong --num_images 8000 --size 32 \
        --wrong_fraction 0.4 --captions all
    python tiny_world/make_tiny_sdxl.py --output_dir outputs/tiny_sdxl --dataset outputs/shapes_wrong

The second pair remakes the copy kept in `tiny_world/sdxl`. Its captions are wrong for 40% of the images, so that it
draws well and follows prompts badly: that is the room in which sharpening is studied. It is trained as any latent
diffusion model is, by plain diffusers code: the VAE, then the UNet on its latents; the text encoders stay random,
which suffices to tell 54 captions apart. With `--world signs` for both commands, and images of its own, the model
draws the signs of `tiny_world/signs.py`; `python -m study.signs` makes that one.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from torchvision.utils import save_image
from tqdm.auto import tqdm

from sharpening.errors import UserError, exit_status, require
from sharpening.files import check_writable, write_aside
from sharpening.flags import Flag, parse
from tiny_world.tiny_sdxl import SIZE, build_random_sdxl, make_pipeline, save_pipeline
from tiny_world.worlds import WORLDS

FLAGS = (
    Flag("output_dir", "new or empty folder for the pipeline", Path, required=True),
    Flag("random", "save random weights and stop", bool, False),
    Flag("world", "whose captions it learns and is judged by", default="shapes", choices=tuple(WORLDS)),
    Flag("dataset", "or train on this image folder of 32 px images", metavar="DIR"),
    Flag("seed", "of all that is random", int, 0),
    Flag("vae_steps", "training steps of the autoencoder", int, 1500, "[1, inf)"),
    Flag("unet_steps", "training steps of the UNet", int, 2200, "[1, inf)"),
    Flag("threads", "CPU threads; another number rounds sums differently", int, 2, "[1, inf)"),
    Flag("num_images", "how many images to judge it by, twice", int, 400, "[2, inf)"),
    Flag("grid", "write sample images of all captions here", Path, metavar="PNG"),
)


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
def standardise_pooled(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> None:
    """Give the pooled features of distinct captions zero mean, and unit standard deviation over all of them.

    Those of a random encoder differ by a few percent of what they have in common, too little to learn many words from.
    The mean moves into the bias of the norm before the projection, the deviation into the projection.
    """
    encoder, distinct = pipeline.text_encoder_2, sorted(set(captions))
    ids = pipeline.tokenizer_2(distinct, padding="max_length", return_tensors="pt").input_ids
    states = encoder(ids).last_hidden_state  # (K, 77, P), behind the norm
    ends = (ids == encoder.config.eos_token_id).int().argmax(dim=1)
    encoder.text_model.final_layer_norm.bias -= states[torch.arange(len(ids)), ends].mean(dim=0)
    encoder.text_projection.weight /= encoder(ids).text_embeds.std()


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
    dataset: str | Path, seed: int = 0, vae_steps: int = 1500, unet_steps: int = 2200, world: str = "shapes"
) -> StableDiffusionXLPipeline:
    """Train a tiny SDXL on an image folder of 32 px images; the same seed and thread count give the same weights."""
    images, captions = load_image_folder(dataset)
    foreign = set(captions) - set(WORLDS[world].captions["all"]())
    require(
        not foreign,
        f"--dataset {dataset} holds {min(foreign, default='')!r}, no caption of --world {world}; name its world",
    )
    pipeline = make_pipeline(seed, small=False, world=world)
    torch.manual_seed(seed)
    train_vae(pipeline.vae, images, vae_steps)
    standardise_latents(pipeline.vae, images)
    round_to_half(pipeline.vae)
    kept = reconstruction_score(pipeline.vae, world)
    print(f"autoencoder: clean drawings score {kept:.4f} after a round trip", flush=True)
    if WORLDS[world].many_words:
        standardise_pooled(pipeline, captions)
    train_unet(pipeline, images, captions, unet_steps)
    round_to_half(pipeline.unet)
    return pipeline


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


def reconstruction_score(vae: AutoencoderKL, world: str = "shapes") -> float:
    """Mean score of fresh clean drawings of all captions after encoding and decoding."""
    rng = np.random.default_rng(0)
    captions = WORLDS[world].captions["all"]() * 2
    drawings = np.stack([np.asarray(WORLDS[world].draw(caption, rng, SIZE)) for caption in captions])
    images = torch.from_numpy(drawings).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return float(WORLDS[world].score(reconstruct(vae, images), captions).mean())


def write_grid(path: str | Path, images: np.ndarray, columns: int, scale: int = 2) -> None:
    """Save images `(N, H, W, 3)` in [0, 1] as one PNG, `columns` to a row, each pixel enlarged `scale` times."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    with write_aside(Path(path)) as aside:
        save_image(F.interpolate(pixels, scale_factor=scale), aside, format="png", nrow=columns, padding=0)


def report(pipeline: StableDiffusionXLPipeline, world: str, num_images: int, grid: str | Path | None = None) -> None:
    """Print the mean score over the captions, without guidance and with a scale of 3; write both as one grid."""
    choices = WORLDS[world].captions["all"]()
    captions = [choices[i % len(choices)] for i in range(num_images)]
    grids = []
    for guidance_scale in (1.0, 3.0):  # SDXL's pipeline guides only above 1
        images = sample(pipeline, captions, guidance_scale)
        scores = WORLDS[world].score(images, captions)
        error = scores.std(ddof=1) / np.sqrt(num_images)
        print(f"guidance {guidance_scale:g}: score {scores.mean():.4f} +- {error:.4f} (s.e., {num_images} images)")
        grids.append(images[: len(choices)])
    if grid is not None:
        write_grid(grid, np.concatenate(grids), columns=18)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status.

    Raises:
        UserError: naming the flag and the remedy.
    """
    args = parse("Build a tiny SDXL, random or trained on a tiny world.", {"tiny SDXL": FLAGS}, argv)
    require(args.random != bool(args.dataset), "give one of --random and --dataset DIR, a folder to train on")
    require(
        not args.output_dir.exists() or (args.output_dir.is_dir() and not any(args.output_dir.iterdir())),
        f"--output_dir {args.output_dir} already holds something; name a new or an empty folder.",
    )
    if args.random:
        build_random_sdxl(args.output_dir, args.seed, world=args.world)
        return 0
    check_writable("output_dir", args.output_dir)
    if args.grid:
        check_writable("grid", args.grid.parent)
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    pipeline = train_sdxl(args.dataset, args.seed, args.vae_steps, args.unet_steps, args.world)
    save_pipeline(pipeline, args.output_dir.resolve())
    megabytes = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file()) / 1e6
    print(f"{args.output_dir}: {megabytes:.2f} MB, trained in {time.perf_counter() - started:.0f} s")
    report(pipeline, args.world, args.num_images, args.grid)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
