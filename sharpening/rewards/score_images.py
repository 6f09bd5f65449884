"""`python reward.py`: score images on disk with any reward, as a table and as CSV or JSON."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sharpening.arguments import OneSentenceParser, add_reward_flags, check_reward_flags, reward_flags
from sharpening.errors import UserError, exit_status, first_line

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command.

    Raises:
        UserError: naming the flag and the remedy.
    """
    parser = OneSentenceParser(
        prog="python reward.py",
        description="Score images on disk with any reward, before a run depends on it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--images", required=True, metavar="DIR", help="folder of images, scored in the order of names"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="txt: one prompt per image, in the order of their names, or one for all; csv or jsonl: columns file_name "
        "and text (or prompt); unset: metadata.jsonl in DIR",
    )
    parser.add_argument("--output", metavar="FILE", help="also write the scores here, as .csv or .json")
    parser.add_argument("--batch_size", type=int, default=8, help="images per forward")
    parser.add_argument("--device", help="where reward models run; unset: the accelerator if there is one")
    parser.add_argument("--cache_dir", help="where models and grades are cached")
    add_reward_flags(parser.add_argument_group("reward"))
    args = parser.parse_args(argv)
    check_reward_flags(args)
    if args.batch_size < 1:
        raise UserError(f"--batch_size is {args.batch_size}, but it must be at least 1")
    if args.output and Path(args.output).suffix not in (".csv", ".json"):
        raise UserError(f"--output {args.output} must end in .csv or .json")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise UserError(f"--output {args.output}: its folder does not exist; create it")
    return args


def read_pairs(images: str, prompts: str | None) -> list[tuple[Path, str]]:
    """Image files with their prompts; the docstring of `--prompts` has the forms.

    Raises:
        UserError: naming the flag, if a file is missing or prompts and images do not match.
    """
    folder = Path(images)
    if not folder.is_dir():
        raise UserError(f"--images {images} is not a folder; give a folder of images")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"--images {images} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    path = Path(prompts) if prompts else folder / "metadata.jsonl"
    if not path.is_file():
        remedy = "correct the path" if prompts else "give --prompts FILE"
        raise UserError(f"--prompts: there is no file {path}; {remedy}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {path} cannot be read ({first_line(error)}); give UTF-8 text") from error
    if path.suffix not in (".csv", ".jsonl"):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) not in (1, len(files)):
            raise UserError(
                f"--prompts {path} has {len(lines)} prompts for {len(files)} images; give one a line for every image "
                "in the order of their names, or one for all, or a csv with the columns file_name and text"
            )
        return list(zip(files, lines if len(lines) > 1 else lines * len(files), strict=True))
    try:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        pairs = [(Path(row["file_name"]).name, row["text"] if "text" in row else row["prompt"]) for row in rows]
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(
            f"--prompts {path} must have the columns file_name and text (or prompt) in every row"
        ) from None
    prompt_of = dict(pairs)
    if len(prompt_of) < len(pairs):
        repeated = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise UserError(f"--prompts {path} names {repeated} more than once; leave one row for each image")
    for name, prompt in pairs:
        if not isinstance(prompt, str):
            raise UserError(f"--prompts {path} has {prompt!r} for {name}, which is no text; mend that row")
    missing = [file.name for file in files if file.name not in prompt_of]
    if missing:
        raise UserError(
            f"--prompts {path} has no prompt for {len(missing)} of {len(files)} images, {missing[0]} for one; add it, "
            "or move the image away"
        )
    return [(file, prompt_of[file.name]) for file in files]


def main(args: argparse.Namespace) -> int:
    """Score, print the table, write the file; 0, or 1 if the reward failed."""
    pairs = read_pairs(args.images, args.prompts)
    import torch
    from PIL import Image

    from reward import load_reward
    from sharpening.rewards.calling import RewardError

    device = args.device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    reward = load_reward(args.reward_model, device, **reward_flags(args))
    rows = []
    for start in range(0, len(pairs), args.batch_size):
        batch = pairs[start : start + args.batch_size]
        images = []
        for path, _ in batch:
            try:
                with Image.open(path) as image:
                    images.append(image.convert("RGB"))
            except (OSError, ValueError) as error:
                raise UserError(f"--images: {path} is no readable image ({error}); remove or replace it") from error
        try:
            total, components = reward.score(images, [prompt for _, prompt in batch])
        except RewardError as error:
            print(f"error: {error}; nothing was written", file=sys.stderr)
            return 1
        for row, (path, prompt) in enumerate(batch):
            scores = {"reward": total[row].item()} | {name: column[row].item() for name, column in components.items()}
            rows.append((path.name, prompt, {name: None if x != x else x for name, x in scores.items()}))
    print(table(rows))
    if args.output:
        write(Path(args.output), rows)
    return 0


def table(rows: list[tuple[str, str, dict[str, float | None]]]) -> str:
    """The scores as text, one image a line, then mean and standard error of those that have a score."""
    import numpy as np

    def cut(text: str, width: int) -> str:
        text = " ".join(text.split())
        return text if len(text) <= width else text[: width - 1] + "…"

    names = list(rows[0][2])
    lines = [["image", "prompt", *names]]
    for file, prompt, scores in rows:
        cells = ["failed" if scores[name] is None else f"{scores[name]:.4f}" for name in names]
        lines.append([cut(file, 32), cut(prompt, 48), *cells])
    columns = [np.array([scores[name] for *_, scores in rows if scores[name] is not None]) for name in names]
    means = [f"{column.mean():.4f}" if len(column) else "" for column in columns]
    errors = [f"{column.std(ddof=1) / len(column) ** 0.5:.4f}" if len(column) > 1 else "" for column in columns]
    lines += [["mean", "", *means], ["standard error", "", *errors]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = []
    for line in lines:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        text.append("  ".join(left + right).rstrip())
    rule = "-" * sum(widths, 2 * (len(widths) - 1))
    return "\n".join([text[0], rule, *text[1:-2], rule, *text[-2:]])


def write(path: Path, rows: list[tuple[str, str, dict[str, float | None]]]) -> None:
    """The scores at full precision as CSV (empty where an image failed) or JSON (null); whole or not at all."""
    records = [{"file_name": file, "prompt": prompt, **scores} for file, prompt, scores in rows]
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":
            json.dump(records, file, indent=1, ensure_ascii=False)
        else:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    partial.replace(path)


def cli(argv: Sequence[str]) -> int:
    """`main` on a command line; a `UserError` becomes one sentence on stderr and status 2."""
    return exit_status(lambda: main(parse_args(argv)))
