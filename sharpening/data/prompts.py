"""Prompts without images: from a file, or from the captions of a data set."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from sharpening.data.dataset_loading import load_train_split, with_columns
from sharpening.errors import UserError, reason, shortened


class Prompts(NamedTuple):
    """Prompts to train on without images, and how they came about in one line."""

    dataset: datasets.Dataset  # one column, "prompt": distinct, one line each, not empty
    description: str


def load_prompts(
    *,
    prompts_file: str | None,
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    caption_column: str,
    max_train_samples: int | None,
    seed: int,
    cache_dir: str | None,
) -> Prompts:
    """Prompts from a file or from the caption column of a data set, whose images are not read.

    A prompt of several lines becomes one line; empty ones and repetitions are left out; the description counts them.

    Args:
        prompts_file: a text file with a prompt on each line, or csv or jsonl with the column `caption_column`; UTF-8.
            The other arguments are as for `load_captioned_images`.

    Raises:
        UserError: no such file or data, no such column, something that is no text, or no prompt at all.
    """
    if prompts_file:
        captions = _read_prompts(Path(prompts_file).expanduser(), caption_column)
        name = prompts_file
    else:
        dataset = load_train_split(dataset_name, dataset_config_name, train_data_dir, cache_dir)
        dataset = with_columns(dataset, {"--caption_column": caption_column})
        column = dataset.with_format("arrow")
        tables = column.iter(batch_size=1000)
        captions = (caption for table in tables for caption in table.column(0).to_pylist())
        name = dataset_name or train_data_dir
    prompts: dict[str, None] = {}
    counts = dict.fromkeys(("read", "empty", "repeated", "joined"), 0)
    for row, value in enumerate(captions):
        for caption in value if isinstance(value, list) else [value]:
            if not (caption is None or isinstance(caption, str)):
                raise UserError(
                    f"--caption_column '{caption_column}' holds {shortened(caption)} in row {row} of {name}, not a "
                    "text; mend or remove that row, or name another column."
                )
            lines = [line.strip() for line in (caption or "").splitlines() if line.strip()]
            prompt = " ".join(lines)
            counts["read"] += 1
            counts["joined"] += len(lines) > 1
            counts["empty"] += not prompt
            counts["repeated"] += prompt in prompts
            if prompt:
                prompts[prompt] = None
    if not prompts:
        raise UserError(f"'{name}' holds no prompt; give one prompt a line, or name the column by --caption_column.")
    kept = datasets.Dataset.from_dict({"prompt": list(prompts)})
    if max_train_samples is not None and max_train_samples < len(kept):
        kept = kept.shuffle(seed=seed).select(range(max_train_samples))
    description = (
        f"{len(kept)} prompts of {name} ({counts['read']} read: {counts['empty']} empty and {counts['repeated']} "
        f"repeated left out, {counts['joined']} of several lines joined)"
    )
    return Prompts(kept, description)


def _read_prompts(path: Path, caption_column: str) -> Iterator[Any]:
    """The prompts of a file, unchecked, one at a time."""
    kind = path.suffix.lower()
    if kind not in ("", ".txt", ".csv", ".jsonl"):
        raise UserError(f"--prompts_file {path} must end in .txt (a prompt on each line), .csv or .jsonl; rename it.")
    try:
        with path.open(encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file:
            if kind == ".csv":
                rows: Iterator[Any] = csv.DictReader(file)
            elif kind == ".jsonl":
                rows = (json.loads(line) for line in file if line.strip())
            else:
                yield from file
                return
            for number, row in enumerate(rows, 1):
                if isinstance(row, dict) and None in row:
                    raise UserError(
                        f"--prompts_file {path} has more fields in row {number} than in its header; put prompts that "
                        "hold commas in quotes, or give a text file."
                    )
                if not isinstance(row, dict) or caption_column not in row:
                    known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                    raise UserError(
                        f"--prompts_file {path} has no '{caption_column}' in row {number}, only {known}; name the "
                        "column by --caption_column."
                    )
                yield row[caption_column]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"--prompts_file {path} cannot be read ({reason(error)}); give a UTF-8 text file with a prompt on each "
            "line, or csv or jsonl."
        ) from error
