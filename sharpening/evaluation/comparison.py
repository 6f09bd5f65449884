"""Evaluating models: images drawn once and kept, scores, and statistics that are paired by prompt and seed.

Image i of every model is drawn for prompt `i mod number of prompts` from noise of seed `seed + i`, so that models are
compared on the same noise. Images are kept as PNG and scores are computed from those files: a metric computed twice
is identical, and what was not drawn yet when a run was interrupted is all that the next one draws.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sharpening import sdxl
from sharpening.arguments import LORA_FILE
from sharpening.errors import UserError, first_line
from sharpening.evaluation import search
from sharpening.rewards.calling import Reward
from sharpening.running.tracking import to_numpy
from sharpening.sdxl import Source
from sharpening.trajectory import Guide, Predict, Schedule

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
    folder.mkdir(parents=True, exist_ok=True)
    cost_file = folder / "cost.json"
    spent = json.loads(cost_file.read_text()) if cost_file.exists() else {"images": 0, "rows": 0, "seconds": 0.0}
    if missing:
        pipeline = load()
        counted = {"rows": 0}

        def count(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counted["rows"] += len(inputs[0])

        pipeline.unet.register_forward_pre_hook(count)
        for start in tqdm(range(0, len(missing), batch_size), desc=f"drawing {label}"):
            batch, started, before = missing[start : start + batch_size], time.perf_counter(), counted["rows"]
            texts, seeds = [prompts[index] for index in batch], [drawing.seed + index for index in batch]
            images = _draw(pipeline, texts, seeds, drawing, reward, batch_size)
            arrays = to_numpy(images.float())  # waits for the GPU
            spent["seconds"] += time.perf_counter() - started
            spent["rows"] += counted["rows"] - before
            spent["images"] += len(batch)
            for index, array in zip(batch, arrays, strict=True):
                partial = folder / f"{names[index]}.partial"
                Image.fromarray(array).save(partial, format="PNG")
                partial.replace(folder / names[index])
            cost_file.write_text(json.dumps(spent))
    images = spent["images"] or float("nan")
    return Cost(spent["rows"] / images, spent["seconds"] / images)


def _draw(
    pipeline: StableDiffusionXLPipeline,
    prompts: list[str],
    seeds: list[int],
    drawing: Drawing,
    reward: Reward,
    batch_size: int,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], by the pipeline itself or by a search on its parts, from the same noise."""
    unet, vae, device = pipeline.unet, pipeline.vae, pipeline.unet.device
    size = drawing.resolution or pipeline.default_sample_size * pipeline.vae_scale_factor
    shape = sdxl.latent_shape(vae, size)
    if drawing.search is None:
        # In float32 whatever the model computes in: a generator's float16 numbers are other ones.
        noise = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return pipeline(
            prompt=prompts,
            latents=torch.cat(noise).to(device, unet.dtype),
            num_inference_steps=drawing.steps,
            guidance_scale=drawing.guidance_scale,
            height=drawing.resolution,
            width=drawing.resolution,
            output_type="pt",
        ).images
    embeds, negative, pooled, negative_pooled = (
        part.float() for part in pipeline.encode_prompt(prompts, do_classifier_free_guidance=True)
    )
    condition = sdxl.Condition(embeds, pooled, sdxl.default_time_ids(len(prompts), size, device))
    unconditional = sdxl.Unconditional(negative[:1], negative_pooled[:1])
    schedule = Schedule.from_config(pipeline.scheduler.config, drawing.steps)

    def model(rows: Tensor) -> tuple[Predict, Guide | None]:
        # The pipeline guides above 1 only.
        return sdxl.branch_model(unet, condition.rows(rows), unconditional, max(1.0, drawing.guidance_scale))

    def judge(latents: Tensor, rows: Tensor) -> Tensor:
        decoded = sdxl.decode_latents(vae, latents, batch_size)
        return reward.get_reward(decoded, [prompts[row] for row in rows])

    problem = search.Problem(model, judge, schedule, shape, seeds, device, batch_size)
    name, arguments = search.parse(drawing.search)
    with torch.autocast(device.type, enabled=device.type == "cuda"):
        return sdxl.decode_latents(vae, search.METHODS[name](problem, *arguments), batch_size)


def read_images(folder: Path, prompts: Sequence[str], rows: range) -> Tensor:
    """Some of the images of the prompts, (len(rows), 3, H, W) float32 in [0, 1]."""
    names = image_names(prompts)
    arrays = [np.array(Image.open(folder / names[row]).convert("RGB")) for row in rows]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


class Comparison(NamedTuple):
    """One metric of one model; the last five are against the base on the same prompts and seeds, NaN for the base."""

    images: int  # that have a score, of both models
    mean: float
    standard_error: float
    gain: float
    gain_standard_error: float
    win_rate: float  # share of images better than the base's, ties counting a half
    win_low: float  # bounds of its 95% bootstrap interval
    win_high: float


def compare(scores: np.ndarray, base: np.ndarray | None, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Statistics of a model's scores (N,), paired with the base's (N,); images without a score in either are left out.

    The interval is the percentile bootstrap's over pairs (Efron & Tibshirani 1993, chapter 13): it speaks of other
    noise on these prompts, as the standard errors do; where a prompt has many images, other prompts may vary more.
    """
    known = np.isfinite(scores) if base is None else np.isfinite(scores) & np.isfinite(base)
    scores = scores[known]
    count = len(scores)

    def standard_error(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / count**0.5) if count > 1 else float("nan")

    mean = float(scores.mean()) if count else float("nan")
    if base is None or not count:
        return Comparison(count, mean, standard_error(scores), *[float("nan")] * 5)
    difference = scores - base[known]
    wins = (difference > 0) + 0.5 * (difference == 0)
    rng = np.random.default_rng(seed)
    rates = np.array([wins[rng.integers(count, size=count)].mean() for _ in range(resamples)])
    low, high = np.quantile(rates, [0.025, 0.975])
    return Comparison(
        count, mean, standard_error(scores), float(difference.mean()), standard_error(difference),
        float(wins.mean()), float(low), float(high),
    )  # fmt: skip


def table(results: Mapping[str, Mapping[str, Comparison]], trained_on: str) -> str:
    """The comparisons, metric -> model -> Comparison, as text, grouped by metric."""
    header = ["metric", "model", "mean", "(se)", "gain", "(se)", "wins over base [95%]"]
    lines = [header]
    for metric, models in results.items():
        label = f"{metric} (trained on)" if metric == trained_on else metric
        for model, c in models.items():
            cells = [label, model, f"{c.mean:.4f}", f"{c.standard_error:.4f}"]
            if not np.isnan(c.gain):
                cells += [f"{c.gain:+.4f}", f"{c.gain_standard_error:.4f}"]
                cells += [f"{c.win_rate:.3f} [{c.win_low:.3f}, {c.win_high:.3f}]"]
            lines.append([*cells, *[""] * (len(header) - len(cells))])
            label = ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(map(len, text))
    body = []
    for line in text[1:]:
        if line[0] != " ":
            body.append(rule)
        body.append(line)
    return "\n".join([text[0], *body])


def write_grid(images: Mapping[str, Tensor], prompts: Sequence[str], path: Path) -> None:
    """A grid of strips, one for each prompt: the same noise drawn by every model, in their order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = max(1, 12 // len(images))
    rows = -(-len(prompts) // columns)
    width = columns * 1.3 * len(images)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, rows * 1.75 + 0.4), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, (axis, prompt) in enumerate(zip(axes.flat, prompts, strict=False)):
        parts = []
        for drawn in images.values():
            height = drawn.shape[2]
            parts += [drawn[index], drawn.new_ones(3, height, max(1, height // 16))]
        axis.imshow(torch.cat(parts[:-1], dim=2).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(prompt if len(prompt) < 42 else f"{prompt[:40]}...", fontsize=7)
    figure.suptitle(f"same noise, from left to right: {', '.join(images)}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
