"""Throughput of the rewards: batches against one image at a time, interleaved in one process, as ratios.

    python benchmarks/rewards.py --rewards image_reward clip --output rewards.json

Models have the published sizes and random weights, which cost what real ones cost. For every reward the same images
are scored in batches of 1, 8 and 32 and, for ImageReward, by the loop of the authors' package: one PIL image after the
other, prompts padded to 35 tokens. The mllm reward asks a local server that takes 0.2 s for an answer.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from benchmarks.measuring import timed
from benchmarks.reporting import spread
from benchmarks.reward_models import (
    CLIP,
    HPSV2,
    write_aesthetic_head,
    write_clip,
    write_image_reward,
    write_pickscore,
)
from reward import load_reward
from sharpening.errors import exit_status, require
from sharpening.flags import Flag, parse
from sharpening.rewards.calling import Reward
from sharpening.rewards.image_reward import ImageRewardReward
from sharpening.rewards.image_reward_network import MAX_TOKENS
from sharpening.rewards.preprocessing import CLIP_MEAN, CLIP_STD
from tiny_world.grader_server import Action, GraderServer

PROMPTS = [
    "a red circle on a white background",
    "a photo of an astronaut riding a horse on the moon",
    "two dogs on a beach at sunset, oil painting",
    "an old castle above the sea",
]
EVERY = ["image_reward", "clip", "pickscore", "hpsv2", "aesthetic", "mllm", "jpeg_compressibility", "shapes"]
FLAGS = (
    Flag("rewards", "which", default=EVERY, choices=tuple(EVERY), nargs="+"),
    Flag("batch_sizes", "images scored together", int, [1, 8, 32], nargs="+"),
    Flag("images", "scored in every round", int, 32, "[1, inf)"),
    Flag("resolution", "of the images in pixels", int, 512, "[1, inf)"),
    Flag("rounds", "that are timed", int, 3, "[1, inf)"),
    Flag("device", "where models run", default="cuda" if torch.cuda.is_available() else "cpu"),
    Flag("output", "write every figure here as JSON", Path),
)


@contextmanager
def published_size(name: str, folder: Path, device: str) -> Iterator[Reward]:
    """The reward with random weights of the published size, written into an empty folder."""
    if name == "image_reward":
        yield load_reward(f"image_reward:{write_image_reward(folder, PROMPTS)}", device)
    elif name == "clip":
        yield load_reward(f"clip:{CLIP}/{write_clip(folder, CLIP)}", device)
    elif name == "hpsv2":
        yield load_reward(f"hpsv2:{write_clip(folder, HPSV2)}", device)
    elif name == "aesthetic":
        head, clip = write_aesthetic_head(folder), f"{CLIP}/{write_clip(folder, CLIP)}"
        yield load_reward(f"aesthetic:{head}", device, aesthetic_clip=clip)
    elif name == "pickscore":
        yield load_reward(f"pickscore:{write_pickscore(folder)}", device)
    elif name == "mllm":
        with GraderServer() as server:
            server.default = Action(delay=0.2)
            # No cache: every round must ask again.
            yield load_reward("mllm", base_url=server.base_url, cache_dir=str(folder / "none"), mllm_concurrency=32)
    else:
        yield load_reward(name, device)


def authors_loop(reward: ImageRewardReward, images: list[Image.Image], prompts: list[str]) -> None:
    """ImageReward's own way: each PIL image resized by PIL and scored alone, its prompt padded to 35 tokens."""
    scorer = reward.scorer
    resize = transforms.Resize(224, transforms.InterpolationMode.BICUBIC)
    steps = [resize, transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)]
    pipeline = transforms.Compose(steps)
    padding = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
    for image, prompt in zip(images, prompts, strict=True):
        pixels = pipeline(image)[None].to(scorer.device)
        tokens = scorer.tokenizer([prompt], **padding).to(scorer.device)
        with torch.no_grad():
            scorer.network(pixels, tokens.input_ids, tokens.attention_mask).item()


def measure(
    name: str, count: int, resolution: int, batch_sizes: list[int], rounds: int, device: str
) -> dict[str, Any]:
    """Seconds per image of every way to score `count` images, by round, interleaved."""
    generator = torch.Generator().manual_seed(0)
    size = 32 if name == "shapes" else resolution  # its world's size
    small = torch.rand(count, 3, 16, 16, generator=generator)
    images = torch.nn.functional.interpolate(small, (size,) * 2, mode="bilinear").to(device)
    prompts = [PROMPTS[0 if name == "shapes" else row % len(PROMPTS)] for row in range(count)]
    with tempfile.TemporaryDirectory() as folder, published_size(name, Path(folder), device) as reward:

        def in_batches(size: int) -> Callable[[int], None]:
            def run(round_number: int) -> None:
                # The grader remembers what it saw, on disk: give it something new every time.
                fresh = [f"{prompt} {size} {round_number} {row}" for row, prompt in enumerate(prompts)]
                asked = fresh if name == "mllm" else prompts
                for start in range(0, count, size):
                    reward.get_reward(images[start : start + size], asked[start : start + size])

            return run

        ways = {f"batch {size}": in_batches(size) for size in batch_sizes}
        if name == "image_reward":
            pictures, alone = [to_pil_image(image.cpu()) for image in images], ImageRewardReward(folder, device)
            ways["authors' loop"] = lambda round_number: authors_loop(alone, pictures, prompts)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for round_number in range(rounds + 1):
            for way, run in ways.items():
                spent = timed(lambda run=run, number=round_number: run(number))
                if round_number:  # the first round warms up
                    seconds[way].append(spent / count)
    return {"reward": name, "seconds_per_image": seconds}


def ratios(result: dict[str, Any], of: str, to: str) -> list[float]:
    """How many times the images per second of one way are those of another, round by round."""
    seconds = result["seconds_per_image"]
    return [slow / fast for slow, fast in zip(seconds[of], seconds[to], strict=True)]


def main(argv: list[str]) -> int:
    """Measure, print, write; returns the exit status."""
    args = parse(__doc__.splitlines()[0], {"rewards": FLAGS}, argv)
    sizes = args.batch_sizes
    require(min(sizes) >= 1, f"--batch_sizes has {min(sizes)}, but it must be at least 1")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.images} images")
    print(f"{'reward':>20}  {'way':>13}  {'s/image':>8}  speed against batch {sizes[0]} (lowest to highest)")
    results = []
    for name in args.rewards:
        result = measure(name, args.images, args.resolution, sizes, args.rounds, args.device)
        results.append(result)
        for way, seconds in result["seconds_per_image"].items():
            gain = spread(ratios(result, f"batch {sizes[0]}", way))
            print(f"{name:>20}  {way:>13}  {statistics.median(seconds):8.4f}  {gain}", flush=True)
        if name == "image_reward" and 8 in sizes:
            gain = spread(ratios(result, "authors' loop", "batch 8"))
            print(f"{name:>20}  batch 8 against the authors' loop: {gain}")
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
