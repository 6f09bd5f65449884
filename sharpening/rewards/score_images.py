"""`python reward.py`: score images on disk with any reward, as a table and as CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpening import flags
from sharpening.errors import Stop, UserError, exit_status, first_line, require
from sharpening.files import write_aside

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from sharpening.rewards.calling import Reward

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
COMMAND_FLAGS = (
    flags.Flag("images", "folder of images, scored in the order of names", required=True, metavar="DIR"),
    flags.Flag(
        "prompts",
        "txt: one prompt per image, in the order of their names, or one for all; csv or jsonl: columns file_name "
        "and text (or prompt); unset: metadata.jsonl in DIR",
        metavar="FILE",
    ),
    flags.Flag("output", "also write the scores here, as .csv or .json", metavar="FILE"),
    flags.Flag("batch_size", "images per forward", int, 8, "[1, inf)"),
    flags.Flag("device", "where reward models run; unset: the accelerator if there is one"),
    flags.Flag("cache_dir", "where models and grades are cached"),
)

Check = Callable[[Mapping[str, Any]], None]
Load = Callable[[Mapping[str, Any], "str | torch.device"], "Reward"]


def cli(argv: Sequence[str], reward_flags: Sequence[flags.Flag], check: Check, load: Load) -> int:
    """The command; a `UserError` becomes one sentence on stderr and status 2.

    Args:
        argv: its command line.
        reward_flags: the flags of rewards.
        check: refuses values of flags, by name, that cannot work.
        load: the reward that values of flags, by name, mean, on a device.
    """
    return exit_status(lambda: run(parse(argv, reward_flags, check), load))


def parse(argv: Sequence[str], reward_flags: Sequence[flags.Flag], check: Check) -> dict[str, Any]:
    """The values of the flags by name.

    Raises:
        UserError: naming the flag and the remedy.
    """
    groups = {"images": COMMAND_FLAGS, "reward": reward_flags}
    description = "Score images on disk with any reward, before a run depends on it."
    values = vars(flags.parse(description, groups, argv, "python reward.py"))
    check(values)
    output = values["output"]
    if output:
        require(Path(output).suffix in (".csv", ".json"), f"--output {output} must end in .csv or .json")
        require(Path(output).resolve().parent.is_dir(), f"--output {output}: its folder does not exist; create it")
    return values


def run(values: Mapping[str, Any], load: Load) -> int:
    """Score, print the table, write the file; 0."""
    pairs = read_pairs(values["images"], values["prompts"])
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    scores = score(load(values, values["device"] or accelerator), pairs, values["batch_size"])
    print(table(pairs, scores))
    if values["output"]:
        write(Path(values["output"]), pairs, scores)
    return 0


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


def score(reward: Reward, pairs: Sequence[tuple[Path, str]], batch_size: int) -> pd.DataFrame:
    """A row for each image: the column `reward`, then those of its components; NaN where one could not be scored.

    Raises:
        UserError: a file is no image.
        Stop: the reward failed.
    """
    import pandas as pd
    from PIL import Image

    from sharpening.progress import progress
    from sharpening.rewards.calling import RewardError

    parts = []
    for start in progress(range(0, len(pairs), batch_size), desc="scoring", unit="batch", delay=1):
        batch = pairs[start : start + batch_size]
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
            raise Stop(1) from error
        columns = {"reward": total} | components
        parts.append(pd.DataFrame({name: column.double().numpy() for name, column in columns.items()}))
    return pd.concat(parts, ignore_index=True)


def table(pairs: Sequence[tuple[Path, str]], scores: pd.DataFrame) -> str:
    """The scores as text, one image a line, then mean and standard error of those that have a score."""

    def cut(text: str, width: int) -> str:
        text = " ".join(text.split())
        return text if len(text) <= width else text[: width - 1] + "…"

    def cells(numbers: Iterable[float], absent: str) -> list[str]:
        return [absent if number != number else f"{number:.4f}" for number in numbers]

    lines = [["image", "prompt", *scores]]
    for (path, prompt), row in zip(pairs, scores.itertuples(index=False), strict=True):
        absent = "failed" if row[0] != row[0] else "-"  # a part that this prompt does not ask for
        lines.append([cut(path.name, 32), cut(prompt, 48), *cells(row, absent)])
    lines += [["mean", "", *cells(scores.mean(), "")], ["standard error", "", *cells(scores.sem(), "")]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        text.append("  ".join(left + right).rstrip())
    rule = "-" * sum(widths, 2 * (len(widths) - 1))
    return "\n".join([text[0], rule, *text[1:-2], rule, *text[-2:]])


def write(path: Path, pairs: Sequence[tuple[Path, str]], scores: pd.DataFrame) -> None:
    """The scores at full precision as CSV (empty where there is none) or JSON (null); whole or not at all."""
    import pandas as pd

    names, prompts = [file.name for file, _ in pairs], [prompt for _, prompt in pairs]
    rows = pd.DataFrame({"file_name": names, "prompt": prompts, **scores})
    with write_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":  # not by pandas, which writes 15 digits at most
            records = rows.astype(object).where(rows.notna(), None).to_dict("records")
            json.dump(records, file, indent=1, ensure_ascii=False)
        else:
            rows.to_csv(file, index=False, lineterminator="\r\n")
