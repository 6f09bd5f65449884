"""Throughput of the rewards: batches against one image at a time, interleaved in one process, as ratios.

    python benchmarks/rewards.py --rewards image_reward clip --output rewards.json

Models have the published sizes and random weights, which cost what real ones cost. For every reward the same images
are scored in batches of 1, 8 and 32 and, for ImageReward, by the loop of the authors' package: one PIL image after the
other, prompts padded to 35 tokens. The mllm reward asks a local server that takes 0.2 s for an answer.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from reward import load_reward
from sharpening.rewards.calling import Reward
from sharpening.rewards.image_reward import MAX_TOKENS
from tests.support import tiny_rewards
from tiny_world.grader_server import Action, GraderServer

PROMPTS = [
    "a red circle on a white background",
    "a photo of an astronaut riding a horse on the moon",
    "two dogs on a beach at sunset, oil painting",
    "an old castle above the sea",
]


@contextmanager
def published_size(name: str, folder: Path, device: str) -> Iterator[Reward]:
    """The reward with random weights of the published size."""
    if name == "image_reward":
        torch.save(tiny_rewards.image_reward_weights("full"), folder / "ImageReward.pt")
        tiny_rewards.write_vocab(folder / "vocab.txt")
        yield load_reward(f"image_reward:{folder}", device)
    elif name in ("clip", "hpsv2", "aesthetic"):
        import open_clip

        architecture = {"hpsv2": "ViT-H-14"}.get(name, "ViT-L-14-quickgelu")
        torch.save(open_clip.create_model(architecture).state_dict(), folder / "clip.pt")
        clip = f"{architecture}/{folder}/clip.pt"
        if name == "hpsv2":
            yield load_reward(f"hpsv2:{folder}/clip.pt", device)
        elif name == "clip":
            yield load_reward(f"clip:{clip}", device)
        else:
            head = tiny_rewards.write_aesthetic_head(folder, width=768)
            yield load_reward(f"aesthetic:{head}", device, aesthetic_clip=clip)
    elif name == "pickscore":
        yield load_reward(f"pickscore:{tiny_rewards.write_pickscore(folder, size='full')}", device)
    elif name == "mllm":
        with GraderServer() as server:
            server.default = Action(delay=0.2)
            # No cache: every round must ask again.
            yield load_reward("mllm", base_url=server.base_url, cache_dir=str(folder / "none"), mllm_concurrency=32)
    else:
        yield load_reward(name, device)


def authors_loop(reward: Reward, images: list, prompts: list[str]) -> None:
    """ImageReward's own way: each PIL image resized by PIL and scored alone, its prompt padded to 35 tokens."""
    from torchvision import transforms

    from sharpening.rewards.preprocessing import CLIP_MEAN, CLIP_STD

    scorer = reward._scorers[0].__self__.scorer
    resize = transforms.Resize(224, transforms.InterpolationMode.BICUBIC)
    steps = [resize, transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)]
    pipeline = transforms.Compose(steps)
    for image, prompt in zip(images, prompts, strict=True):
        pixels = pipeline(image)[None].to(scorer.device)
        padding = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        tokens = scorer.tokenizer([prompt], **padding).to(scorer.device)
        with torch.no_grad():
            scorer.network(pixels, tokens.input_ids, tokens.attention_mask).item()


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Seconds per image of every way, by round, interleaved."""
    generator = torch.Generator().manual_seed(0)
    resolution = 32 if name == "shapes" else args.resolution  # its world's size
    small = torch.rand(args.images, 3, 16, 16, generator=generator)
    images = torch.nn.functional.interpolate(small, (resolution,) * 2, mode="bilinear").to(args.device)
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(args.images)]
    if name == "shapes":
        prompts = [PROMPTS[0]] * args.images
    with tempfile.TemporaryDirectory() as folder, published_size(name, Path(folder), args.device) as reward:

        def in_batches(size: int) -> Callable[[int], None]:
            def run(round_number: int) -> None:
                # The grader remembers what it saw, on disk: give it something new every time.
                fresh = [f"{prompt} {size} {round_number} {row}" for row, prompt in enumerate(prompts)]
                asked = fresh if name == "mllm" else prompts
                for start in range(0, args.images, size):
                    reward.get_reward(images[start : start + size], asked[start : start + size])

            return run

        ways = {f"batch {size}": in_batches(size) for size in args.batch_sizes}
        if name == "image_reward":
            from torchvision.transforms.functional import to_pil_image

            pictures = [to_pil_image(image.cpu()) for image in images]
            ways["authors' loop"] = lambda round_number: authors_loop(reward, pictures, prompts)
        seconds = {way: [] for way in ways}
        for round_number in range(args.rounds + 1):
            for way, run in ways.items():
                started = time.perf_counter()
                run(round_number)
                if round_number:  # the first round warms up
                    seconds[way].append((time.perf_counter() - started) / args.images)
    return {"reward": name, "seconds_per_image": seconds}


def ratios(result: dict[str, object], of: str, to: str) -> list[float]:
    """How many times the images per second of one way are those of another, round by round."""
    seconds = result["seconds_per_image"]
    return [slow / fast for slow, fast in zip(seconds[of], seconds[to], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    every = ["image_reward", "clip", "pickscore", "hpsv2", "aesthetic", "mllm", "jpeg_compressibility", "shapes"]
    parser.add_argument("--rewards", nargs="+", choices=every, default=every)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--images", type=int, default=32, help="scored in every round")
    parser.add_argument("--resolution", type=int, default=512, help="of the images in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write every figure here as JSON")
    args = parser.parse_args()
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.images} images")
    print(f"{'reward':>20}  {'way':>13}  {'s/image':>8}  speed against batch 1 (lowest to highest)")
    results = []
    for name in args.rewards:
        results.append(measure(name, args))
        for way, seconds in results[-1]["seconds_per_image"].items():
            gain = ratios(results[-1], f"batch {args.batch_sizes[0]}", way)
            spread = f"{statistics.median(gain):.2f}x ({min(gain):.2f} to {max(gain):.2f})"
            print(f"{name:>20}  {way:>13}  {statistics.median(seconds):8.4f}  {spread}", flush=True)
        if name == "image_reward" and 8 in args.batch_sizes:
            gain = ratios(results[-1], "authors' loop", "batch 8")
            print(f"{name:>20}  batch 8 against the authors' loop: {statistics.median(gain):.2f}x "
                  f"({min(gain):.2f} to {max(gain):.2f})")  # fmt: skip
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
