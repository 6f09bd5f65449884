"""Drawing images to judge a model by: each drawn once, by plain sampling or by a search, and kept.

Image i of every model is drawn for prompt `i mod number of prompts` from noise of seed `seed + i`, so that models are
compared on the same noise. Images are kept as PNG and scores are computed from those files: a metric computed twice
is identical, and what was not drawn yet when a run was interrupted is all that the next one draws.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from sharpening import sdxl
from sharpening.errors import UserError, first_line
from sharpening.evaluation import search
from sharpening.files import LORA_FILE, write_aside
from sharpening.model_source import Source
from sharpening.progress import progress
from sharpening.trajectory import Schedule

if TYPE_CHECKING:
    from sharpening.rewards.calling import Reward

PARTS = ("unet", "vae", "scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Drawing:
    """How images are drawn; every field shapes them."""

    steps: int
    guidance_scale: float
    resolution: int | None
    seed: int
    search: str | None = None  # see `search.parse`; None is plain sampling
    reward: str | None = None  # what a search looks for, with all that shapes its scores
    dtype: str = "torch.float32"


class Cost(NamedTuple):
    """What drawing cost, per image; NaN if every image was there already."""

    nfe: float  # rows through the UNet: guidance costs two a step
    seconds: float


def compute_dtype(device: torch.device) -> torch.dtype:
    """float16 on a GPU, float32 elsewhere."""
    return torch.float16 if device.type == "cuda" else torch.float32


def load_pipeline(
    path: str, base: str, device: torch.device, cache_dir: str | None = None
) -> StableDiffusionXLPipeline:
    """A pipeline, or the base pipeline with the LoRA adapter in the folder `path`; float16 on a GPU, with DDIM.

    Raises:
        UserError: naming `--models`.
    """
    sdxl.hide_library_bars()
    dtype = compute_dtype(device)
    is_adapter = (Path(path) / LORA_FILE).is_file()
    source = Source("models", base if is_adapter else path, cache_dir=cache_dir)
    # Loaded apart: a VAE that float16 overflows stays in float32, for plain sampling and for search alike.
    vae = sdxl.load_decoder(source, "vae", device, dtype)
    pipeline = source.load(StableDiffusionXLPipeline, dtype=dtype, vae=vae)
    if is_adapter:
        try:
            pipeline.load_lora_weights(path)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--models: the adapter in {path} does not fit {base} ({first_line(error)}); name its base first"
            ) from error
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.to(device).set_progress_bar_config(disable=True)
    return pipeline


def identity(path: str, base: str) -> str:
    """What names the weights in a cache key: a folder by its files' sizes and times, a hub id by itself."""
    if (Path(path) / LORA_FILE).is_file():
        return f"{file_stamp(Path(path) / LORA_FILE)} on {identity(base, base)}"
    return Source("models", path).identity(*PARTS) + file_stamp(Path(path) / "model_index.json")


def file_stamp(path: Path) -> str:
    """A file by its place, size and time; nothing where there is none."""
    if not path.is_file():
        return ""
    status = path.stat()
    return f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"


def image_names(prompts: Sequence[str]) -> list[str]:
    """File names: the place, which decides the seed, and the prompt, so that another one is another image."""
    return [f"{i:05d}-{hashlib.sha256(p.encode()).hexdigest()[:8]}.png" for i, p in enumerate(prompts)]


def image_folder(root: Path, name: str, weights: str, drawing: Drawing) -> Path:
    """Where the images of a model lie: a folder of its own for each weights and each way of drawing."""
    key = json.dumps({"weights": weights, **asdict(drawing)}, sort_keys=True)
    return root / "images" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def draw_missing(
    load: Callable[[], StableDiffusionXLPipeline],
    folder: Path,
    prompts: Sequence[str],
    drawing: Drawing,
    batch_size: int,
    label: str,
    reward: Reward,
) -> Cost:
    """Draw the images that `folder` lacks; `load()` gives the pipeline, and is not called when none is missing.

    `reward` is what a search (`drawing.search`) looks for.
    """
    names = image_names(prompts)
    missing = [index for index, name in enumerate(names) if not (folder / name).exists()]
    cost_file = folder / "cost.json"
    spent = json.loads(cost_file.read_text()) if cost_file.exists() else {"images": 0, "rows": 0, "seconds": 0.0}
    if missing:
        pipeline = load()

        def count(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            spent["rows"] += len(inputs[0])

        pipeline.unet.register_forward_pre_hook(count)
        for start in progress(range(0, len(missing), batch_size), desc=f"drawing {label}"):
            batch, started = missing[start : start + batch_size], time.perf_counter()
            texts, seeds = [prompts[index] for index in batch], [drawing.seed + index for index in batch]
            if drawing.search is None:
                images = _sample(pipeline, texts, seeds, drawing)
            else:
                images = _search(pipeline, texts, seeds, drawing, reward, batch_size)
            pictures = pipeline.numpy_to_pil(pipeline.image_processor.pt_to_numpy(images))  # waits for the GPU
            spent["seconds"] += time.perf_counter() - started
            spent["images"] += len(batch)
            for index, picture in zip(batch, pictures, strict=True):
                with write_aside(folder / names[index]) as aside:
                    picture.save(aside, format="PNG")
            with write_aside(cost_file) as aside:
                aside.write_text(json.dumps(spent))
    images = spent["images"] or float("nan")
    return Cost(spent["rows"] / images, spent["seconds"] / images)


def _image_size(pipeline: StableDiffusionXLPipeline, drawing: Drawing) -> int:
    return drawing.resolution or pipeline.default_sample_size * pipeline.vae_scale_factor


def _sample(pipeline: StableDiffusionXLPipeline, prompts: list[str], seeds: list[int], drawing: Drawing) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] by the pipeline itself."""
    shape = sdxl.latent_shape(pipeline.vae, _image_size(pipeline, drawing))
    # In float32 whatever the model computes in: a generator's float16 numbers are other ones.
    noise = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return pipeline(
        prompt=prompts,
        latents=torch.cat(noise).to(pipeline.unet.device, pipeline.unet.dtype),
        num_inference_steps=drawing.steps,
        guidance_scale=drawing.guidance_scale,
        height=drawing.resolution,
        width=drawing.resolution,
        output_type="pt",
    ).images


def _search(
    pipeline: StableDiffusionXLPipeline,
    prompts: list[str],
    seeds: list[int],
    drawing: Drawing,
    reward: Reward,
    batch_size: int,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] by a search on the pipeline's parts, from the same noise as `_sample`."""
    unet, vae, device = pipeline.unet, pipeline.vae, pipeline.unet.device
    embeds, negative, pooled, negative_pooled = (
        part.float() for part in pipeline.encode_prompt(prompts, do_classifier_free_guidance=True)
    )
    size = _image_size(pipeline, drawing)
    condition = sdxl.Condition(embeds, pooled, sdxl.default_time_ids(len(prompts), size, device))
    unconditional = sdxl.Unconditional(negative[:1], negative_pooled[:1])
    schedule = Schedule.from_config(pipeline.scheduler.config, drawing.steps)

    # The pipeline guides above 1 only.
    denoiser = sdxl.Denoiser(unet, condition, unconditional, max(1.0, drawing.guidance_scale))

    def judge(latents: Tensor, rows: Tensor) -> Tensor:
        decoded = sdxl.decode_latents(vae, latents, batch_size)
        return reward.get_reward(decoded, [prompts[row] for row in rows])

    problem = search.Problem(denoiser.rows, judge, schedule, sdxl.latent_shape(vae, size), seeds, device, batch_size)
    name, arguments = search.parse(drawing.search)
    with torch.autocast(device.type, enabled=device.type == "cuda"):
        return sdxl.decode_latents(vae, search.METHODS[name](problem, *arguments), batch_size)


def read_images(folder: Path, prompts: Sequence[str], rows: Sequence[int]) -> Tensor:
    """Some of the images of the prompts, (len(rows), 3, H, W) float32 in [0, 1]."""
    names = image_names(prompts)
    arrays = [np.array(Image.open(folder / names[row]).convert("RGB")) for row in rows]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
