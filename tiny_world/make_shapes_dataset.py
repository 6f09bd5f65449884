"""Write the captioned-shapes data set as an ordinary image folder: PNG files and a metadata.jsonl.

    python tiny_world/make_shapes_dataset.py --output_dir outputs/shapes --num_images 2000
    python tiny_world/make_shapes_dataset.py --held_out_prompts held_out.txt --training_prompts prompts.txt

The first loads with `datasets.load_dataset("imagefolder", data_dir=...)` and with `--train_data_dir` of the training
scripts; the second writes the prompts that no fine-tuning set contains, and those that one may, one per line.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from sharpening.errors import UserError
from tiny_world.shapes import all_captions, draw, held_out_captions, training_captions, wrong_caption

CAPTION_SETS = {"training": training_captions, "all": all_captions, "held_out": held_out_captions}


def write_dataset(
    output_dir: str | Path,
    num_images: int,
    seed: int = 0,
    size: int = 32,
    wrong_fraction: float = 0.0,
    captions: str = "training",
) -> None:
    """Write `num_images` drawings, `size` pixels square, with their captions.

    Captions are spread evenly over the chosen set. `wrong_fraction` of the images show another colour, another shape,
    or both, than their caption says. The folder is written aside and renamed, so that it is whole or absent.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"--output_dir {output_dir} already holds something; name a new or an empty folder.")
    rng = np.random.default_rng(seed)
    choices = CAPTION_SETS[captions]()
    texts = [choices[i % len(choices)] for i in range(num_images)]
    rng.shuffle(texts)
    wrong = np.zeros(num_images, dtype=bool)
    wrong[: round(num_images * wrong_fraction)] = True
    rng.shuffle(wrong)
    aside = None
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
        aside.chmod(0o755)  # mkdtemp makes it private; the data set is not
        with open(aside / "metadata.jsonl", "w", encoding="utf-8") as metadata:
            for index, text in enumerate(texts):
                shown = wrong_caption(text, rng) if wrong[index] else text
                name = f"{index:06d}.png"
                draw(shown, rng, size).save(aside / name)
                metadata.write(json.dumps({"file_name": name, "text": text}) + "\n")
        os.replace(aside, output_dir)  # an empty folder may be replaced, a filled one may not
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written ({error}); name another folder.") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def write_prompts(path: str | Path, captions: str) -> None:
    """Write the captions of a set, "training" (45) or "held_out" (9), to a text file, one per line."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(CAPTION_SETS[captions]()) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--{captions}_prompts {path} cannot be written ({error}); name another file.") from error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of this command, checked."""
    parser = argparse.ArgumentParser(description="Write the captioned-shapes data set as an image folder.")
    parser.add_argument("--output_dir", help="new or empty folder for the images and metadata.jsonl")
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=32, help="width and height in pixels")
    parser.add_argument("--wrong_fraction", type=float, default=0.0, help="share of images with a wrong caption")
    parser.add_argument("--captions", choices=sorted(CAPTION_SETS), default="training")
    parser.add_argument("--held_out_prompts", metavar="FILE", help="write the held-out prompts here, one per line")
    parser.add_argument("--training_prompts", metavar="FILE", help="write all other prompts here, one per line")
    args = parser.parse_args(argv)
    if args.output_dir is None and args.held_out_prompts is None and args.training_prompts is None:
        parser.error("name something to write: --output_dir for images, --held_out_prompts or --training_prompts.")
    if args.num_images < 1:
        parser.error(f"--num_images must be at least 1, not {args.num_images}.")
    if args.size < 16:
        parser.error(f"--size must be at least 16 pixels for a shape to be recognisable, not {args.size}.")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, but is {args.seed}.")
    if not 0.0 <= args.wrong_fraction <= 1.0:
        parser.error(f"--wrong_fraction must lie between 0 and 1, not {args.wrong_fraction}.")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = parse_args(argv)
    try:
        if args.output_dir is not None:
            write_dataset(args.output_dir, args.num_images, args.seed, args.size, args.wrong_fraction, args.captions)
            print(f"{args.num_images} images of {args.size} px ({args.captions} captions) in {args.output_dir}")
        for captions in ("held_out", "training"):
            path = getattr(args, f"{captions}_prompts")
            if path is not None:
                write_prompts(path, captions)
                print(f"{len(CAPTION_SETS[captions]())} {captions.replace('_', '-')} prompts in {path}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
