"""Write the captioned-shapes data set as an ordinary image folder: PNG files and a metadata.jsonl.

    python tiny_world/make_shapes_dataset.py --output_dir outputs/shapes --num_images 2000
    python tiny_world/make_shapes_dataset.py --held_out_prompts held_out.txt --training_prompts prompts.txt

The first loads with `datasets.load_dataset("imagefolder", data_dir=...)` and with `--train_data_dir` of the training
scripts; the second writes the prompts that no fine-tuning set contains, and those that one may, one per line.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sharpening.errors import UserError, exit_status, require
from sharpening.files import write_aside
from sharpening.flags import Flag, parse
from tiny_world.shapes import all_captions, draw, held_out_captions, training_captions, wrong_caption

CAPTION_SETS = {"training": training_captions, "all": all_captions, "held_out": held_out_captions}
FLAGS = (
    Flag("output_dir", "new or empty folder for the images and metadata.jsonl", Path),
    Flag("num_images", "how many", int, 2000, "[1, inf)"),
    Flag("seed", "of places, sizes and wrong captions", int, 0, "[0, inf)"),
    Flag("size", "width and height in pixels; below 16 no shape can be recognised", int, 32, "[16, inf)"),
    Flag("wrong_fraction", "share of images with a wrong caption", float, 0.0, "[0, 1]"),
    Flag("captions", "which captions", default="training", choices=tuple(sorted(CAPTION_SETS))),
    Flag("held_out_prompts", "write the held-out prompts here, one per line", Path, metavar="FILE"),
    Flag("training_prompts", "write all other prompts here, one per line", Path, metavar="FILE"),
)


def write_dataset(
    output_dir: str | Path,
    num_images: int,
    seed: int = 0,
    size: int = 32,
    wrong_fraction: float = 0.0,
    captions: str = "training",
) -> None:
    """Write `num_images` drawings, `size` pixels square, with their captions, in a folder that is whole or absent.

    Captions are spread evenly over the chosen set. `wrong_fraction` of the images show another colour, another shape,
    or both, than their caption says.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    output_dir = Path(output_dir)
    require(
        not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())),
        f"--output_dir {output_dir} already holds something; name a new or an empty folder.",
    )
    rng = np.random.default_rng(seed)
    choices = CAPTION_SETS[captions]()
    texts = [choices[i % len(choices)] for i in range(num_images)]
    rng.shuffle(texts)
    wrong = np.zeros(num_images, dtype=bool)
    wrong[: round(num_images * wrong_fraction)] = True
    rng.shuffle(wrong)
    try:
        with write_aside(output_dir) as aside:
            aside.mkdir()
            with (aside / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
                for index, text in enumerate(texts):
                    shown = wrong_caption(text, rng) if wrong[index] else text
                    name = f"{index:06d}.png"
                    draw(shown, rng, size).save(aside / name)
                    metadata.write(json.dumps({"file_name": name, "text": text}) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written ({error}); name another folder.") from error


def write_prompts(path: str | Path, captions: str) -> None:
    """Write the captions of a set, "training" (45) or "held_out" (9), to a text file, one per line.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(CAPTION_SETS[captions]()) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--{captions}_prompts {path} cannot be written ({error}); name another file.") from error


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status.

    Raises:
        UserError: naming the flag and the remedy.
    """
    args = parse("Write the captioned-shapes data set as an image folder.", {"shapes": FLAGS}, argv)
    require(
        bool(args.output_dir or args.held_out_prompts or args.training_prompts),
        "name something to write: --output_dir for images, --held_out_prompts or --training_prompts.",
    )
    if args.output_dir is not None:
        write_dataset(args.output_dir, args.num_images, args.seed, args.size, args.wrong_fraction, args.captions)
        print(f"{args.num_images} images of {args.size} px ({args.captions} captions) in {args.output_dir}")
    for captions, path in (("held_out", args.held_out_prompts), ("training", args.training_prompts)):
        if path is not None:
            write_prompts(path, captions)
            print(f"{len(CAPTION_SETS[captions]())} {captions.replace('_', '-')} prompts in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
