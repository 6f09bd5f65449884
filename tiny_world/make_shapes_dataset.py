"""Write a data set of captioned shapes, or signs, as an ordinary image folder: PNG files and a metadata.jsonl.

    python tiny_world/make_shapes_dataset.py --output_dir outputs/shapes --num_images 2000
    python tiny_world/make_shapes_dataset.py --pairs outputs/pairs --num_images 1000
    python tiny_world/make_shapes_dataset.py --held_out_prompts held_out.txt --training_prompts prompts.txt
    python tiny_world/make_shapes_dataset.py --world signs --output_dir outputs/sign_images --num_images 4000

The first loads with `datasets.load_dataset("imagefolder", data_dir=...)` and with `--train_data_dir` of the training
scripts; the second holds compared pairs in the columns of Pick-a-Pic, for `baselines/diffusion_dpo_dataset.py`; the
third writes the prompts that no fine-tuning set contains, and those that one may, one per line. `--world signs` writes
the same of the second world (`tiny_world/signs.py`).
"""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sharpening.errors import UserError, exit_status, require
from sharpening.files import write_aside
from sharpening.flags import Flag, parse
from tiny_world.worlds import WORLDS

CAPTION_SETS = tuple(sorted(WORLDS["shapes"].captions))
FLAGS = (
    Flag("output_dir", "new or empty folder for the images and metadata.jsonl", Path),
    Flag("pairs", "new or empty folder for compared pairs, in the columns of Pick-a-Pic", Path, metavar="FOLDER"),
    Flag("num_images", "how many images, or pairs", int, 2000, "[1, inf)"),
    Flag("seed", "of places, sizes and wrong captions", int, 0, "[0, inf)"),
    Flag("size", "width and height in pixels; below 16 no shape can be recognised", int, 32, "[16, inf)"),
    Flag("wrong_fraction", "share of images with a wrong caption", float, 0.0, "[0, 1]"),
    Flag("world", "of shapes or of signs", default="shapes", choices=tuple(WORLDS)),
    Flag("captions", "which captions", default="training", choices=CAPTION_SETS),
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
    world: str = "shapes",
) -> None:
    """Write `num_images` drawings, `size` pixels square, with their captions, in a folder that is whole or absent.

    Captions are spread evenly over the chosen set. `wrong_fraction` of the images show another colour, another shape
    (or number), or both, than their caption says.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    output_dir = Path(output_dir)
    _require_empty("output_dir", output_dir)
    rng = np.random.default_rng(seed)
    texts = _shuffled(world, captions, num_images, rng)
    wrong = np.zeros(num_images, dtype=bool)
    wrong[: round(num_images * wrong_fraction)] = True
    rng.shuffle(wrong)
    try:
        with write_aside(output_dir) as aside:
            aside.mkdir()
            with (aside / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
                for index, text in enumerate(texts):
                    shown = WORLDS[world].wrong_caption(text, rng) if wrong[index] else text
                    name = f"{index:06d}.png"
                    WORLDS[world].draw(shown, rng, size).save(aside / name)
                    metadata.write(json.dumps({"file_name": name, "text": text}) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written ({error}); name another folder.") from error


def write_pairs(
    folder: str | Path,
    count: int,
    seed: int = 0,
    size: int = 32,
    captions: str = "training",
    world: str = "shapes",
) -> None:
    """Write `count` pairs of drawings as a parquet file with the columns of Pick-a-Pic, in a folder that is whole or
    absent: one shows its caption, the other another colour, another shape (or number), or both. Every
    tenth pair is a tie of two right drawings.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    folder = Path(folder)
    _require_empty("pairs", folder)
    rng = np.random.default_rng(seed)
    texts = _shuffled(world, captions, count, rng)
    columns: dict[str, list] = {"jpg_0": [], "jpg_1": [], "label_0": [], "caption": texts}
    for index, text in enumerate(texts):
        tie, first_is_best = index % 10 == 9, bool(rng.integers(2))
        right = WORLDS[world].draw(text, rng, size)
        other = WORLDS[world].draw(text if tie else WORLDS[world].wrong_caption(text, rng), rng, size)
        columns["jpg_0"].append(_encoded(right if first_is_best else other))
        columns["jpg_1"].append(_encoded(other if first_is_best else right))
        columns["label_0"].append(0.5 if tie else float(first_is_best))
    try:
        with write_aside(folder) as aside:
            aside.mkdir()
            pq.write_table(pa.table(columns), aside / "train.parquet")
    except OSError as error:
        raise UserError(f"--pairs {folder} cannot be written ({error}); name another folder.") from error


def _require_empty(flag: str, folder: Path) -> None:
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(empty, f"--{flag} {folder} already holds something; name a new or an empty folder.")


def _shuffled(world: str, captions: str, count: int, rng: np.random.Generator) -> list[str]:
    """Captions of a set, each as often as the others or once more, in random order."""
    choices = WORLDS[world].captions[captions]()
    texts = [choices[index % len(choices)] for index in range(count)]
    rng.shuffle(texts)
    return texts


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_prompts(path: str | Path, captions: str, world: str = "shapes") -> None:
    """Write the captions of a set of a world, such as "training" or "held_out", to a text file, one per line.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    try:
        with write_aside(path) as aside:
            aside.write_text("\n".join(WORLDS[world].captions[captions]()) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"prompts cannot be written to {path} ({error}); name another file.") from error


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status.

    Raises:
        UserError: naming the flag and the remedy.
    """
    args = parse("Write a captioned data set of a tiny world as an image folder.", {"data set": FLAGS}, argv)
    require(
        bool(args.output_dir or args.pairs or args.held_out_prompts or args.training_prompts),
        "name something to write: --output_dir for images, --pairs, --held_out_prompts or --training_prompts.",
    )
    if args.output_dir is not None:
        options = (args.num_images, args.seed, args.size, args.wrong_fraction, args.captions, args.world)
        write_dataset(args.output_dir, *options)
        print(f"{args.num_images} images of {args.size} px ({args.captions} captions) in {args.output_dir}")
    if args.pairs is not None:
        write_pairs(args.pairs, args.num_images, args.seed, args.size, args.captions, args.world)
        print(f"{args.num_images} pairs of images of {args.size} px ({args.captions} captions) in {args.pairs}")
    for captions, path in (("held_out", args.held_out_prompts), ("training", args.training_prompts)):
        if path is not None:
            write_prompts(path, captions, args.world)
            print(f"{len(WORLDS[args.world].captions[captions]())} {captions.replace('_', '-')} prompts in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
