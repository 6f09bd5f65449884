"""Compare a trained pipeline with its base: held-out reward with standard error, and the same seeds side by side.

    python scripts/compare_models.py --base MODEL --trained outputs/run --prompts prompts.txt --reward_model clip \
        --output_dir outputs/comparison

Prompts are taken in turn until `--num_images` are drawn; image i of both models starts from the same noise, seeded by
`--seed` and i, so the difference is paired. Writes `comparison.json` and `before_after.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain file from anywhere

from reward import load_reward, parse_reward_spec
from sharpening.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags, checked before anything is loaded.

    Raises:
        UserError: naming the flag and the remedy.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--base", required=True, help="pipeline before training: folder or hub id")
    parser.add_argument("--trained", required=True, help="pipeline after training")
    parser.add_argument("--prompts", required=True, type=Path, help="text file, one prompt per line")
    parser.add_argument("--reward_model", default="clip", help="any reward spec, see reward.py")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--num_images", type=int, default=400, help="images per model")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--resolution", type=int, help="pixels; unset: the model's own")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--grid_images", type=int, default=18, help="image pairs in the grid")
    parser.add_argument("--seed", type=int, default=1_000_000, help="first seed, apart from those of training")
    args = parser.parse_args(argv)
    if not args.prompts.is_file():
        raise UserError(f"--prompts {args.prompts} does not exist; give a text file with one prompt per line")
    args.prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
    if not args.prompts:
        raise UserError("--prompts holds no prompt; give a text file with one prompt per line")
    for name in ("num_images", "num_inference_steps", "batch_size", "grid_images"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, but it must be at least 1")
    for name in ("base", "trained"):
        if not (Path(getattr(args, name)) / "model_index.json").is_file() and Path(getattr(args, name)).is_dir():
            raise UserError(f"--{name} {getattr(args, name)} has no model_index.json; give a pipeline folder")
    parse_reward_spec(args.reward_model)
    return args


def draw(args: argparse.Namespace, model: str, prompts: list[str]) -> Tensor:
    """Images (len(prompts), 3, H, W) in [0, 1] by `model` with DDIM, from seeds that depend on the position alone."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline
    from tqdm.auto import tqdm

    on_gpu = torch.cuda.is_available()
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float16 if on_gpu else torch.float32)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{model} could not be loaded ({reason}); give a pipeline folder or a hub id") from error
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.to("cuda" if on_gpu else "cpu").set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(prompts), args.batch_size), desc=f"drawing with {model}"):
        part = prompts[start : start + args.batch_size]
        generators = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(part))]
        images.append(
            pipeline(
                prompt=part,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                height=args.resolution,
                width=args.resolution,
                generator=generators,
                output_type="pt",
            ).images.float().cpu()
        )  # fmt: skip
    return torch.cat(images)


def write_grid(base: Tensor, trained: Tensor, prompts: list[str], path: Path) -> None:
    """A grid of pairs, before on the left and after on the right, each under its prompt."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 6
    rows = -(-len(prompts) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(columns * 2.6, rows * 1.75), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, before, after, prompt in zip(axes.flat, base, trained, prompts, strict=False):
        gap = before.new_ones(3, before.shape[1], max(1, before.shape[2] // 16))
        pair = [part.permute(1, 2, 0).numpy() for part in (before, gap, after)]
        axis.imshow(np.concatenate(pair, axis=1), interpolation="nearest")
        axis.set_title(prompt if len(prompt) < 42 else f"{prompt[:40]}...", fontsize=7)
    figure.suptitle("before (left) and after (right), same noise", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    """Draw, score, print and save; returns the exit status."""
    args = parse_args(argv)
    import torch

    reward = load_reward(args.reward_model, device="cuda" if torch.cuda.is_available() else "cpu")
    prompts = [args.prompts[i % len(args.prompts)] for i in range(args.num_images)]
    images = {name: draw(args, getattr(args, name), prompts) for name in ("base", "trained")}
    scores = {}
    for name, drawn in images.items():
        parts = zip(drawn.split(64), range(0, len(prompts), 64), strict=True)
        scores[name] = torch.cat([reward.get_reward(part, prompts[i : i + len(part)]) for part, i in parts])
    scores["difference"] = scores["trained"] - scores["base"]
    summary = {
        name: {"mean": float(values.mean()), "standard_error": float(values.std() / len(values) ** 0.5)}
        for name, values in scores.items()
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    record = {**{k: v for k, v in vars(args).items() if k not in ("prompts", "output_dir")}, "reward": summary}
    (args.output_dir / "comparison.json").write_text(json.dumps(record, indent=2))
    shown = args.grid_images
    grid_path = args.output_dir / "before_after.png"
    write_grid(images["base"][:shown], images["trained"][:shown], prompts[:shown], grid_path)
    print(
        f"\n{args.reward_model} on {args.num_images} images of {len(args.prompts)} prompts, guidance "
        f"{args.guidance_scale}, {args.num_inference_steps} DDIM steps"
    )
    for name, label in (("base", "before"), ("trained", "after"), ("difference", "after - before (paired)")):
        print(f"{label:>26}  {summary[name]['mean']:+.4f}  (standard error {summary[name]['standard_error']:.4f})")
    print(f"{'before/after grid':>26}  {grid_path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
