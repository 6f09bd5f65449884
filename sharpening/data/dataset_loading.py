"""The train split that the data flags name: on the hub, in a folder, or in files, whatever their form."""

import glob
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from sharpening.errors import NO_ROOM, UserError, reason
from sharpening.files import looks_local

FILE_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


def load_train_split(
    dataset_name: str | None, dataset_config_name: str | None, train_data_dir: str | None, cache_dir: str | None
) -> datasets.Dataset:
    """The training split of whatever the flags name, not empty."""
    flag, name = ("--train_data_dir", train_data_dir) if train_data_dir else ("--dataset_name", dataset_name)
    try:
        if train_data_dir:
            dataset = _load_image_folder(train_data_dir, cache_dir)
        else:
            dataset = _load_named(dataset_name, dataset_config_name, cache_dir)
    except UserError:
        raise
    # What a broken or unreachable data set raises differs by format and by version of `datasets`.
    except Exception as error:
        raise UserError(
            f"{flag} '{name}' cannot be loaded as training data ({reason(error)}); check that it exists, can be read "
            "and has rows in its train split."
        ) from error
    if len(dataset) == 0:
        raise UserError(f"{flag} '{name}' holds no rows; give a data set whose train split is not empty.")
    return dataset


def _load_image_folder(train_data_dir: str, cache_dir: str | None) -> datasets.Dataset:
    folder = os.path.expanduser(train_data_dir)
    if not os.path.isdir(folder):
        raise UserError(f"--train_data_dir '{train_data_dir}' is not a folder; give an image folder.")
    # One pattern for everything: a subfolder called "test" is part of the training data here.
    files = os.path.join(glob.escape(folder), "**")
    return _load("imagefolder", data_files={"train": files}, cache_dir=cache_dir)


def _load_named(name: str, config_name: str | None, cache_dir: str | None) -> datasets.Dataset:
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if any(os.path.isfile(os.path.join(path, marker)) for marker in ("state.json", "dataset_dict.json")):
            return _saved_train_split(name, path)
        return _load(path, config_name, cache_dir=cache_dir)
    suffix = Path(path).suffix
    if not (os.path.isfile(path) or glob.has_magic(path) or suffix in FILE_BUILDERS or looks_local(name)):
        return _load(name, config_name, cache_dir=cache_dir)
    files = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    if not files:
        raise UserError(f"--dataset_name '{name}' names no file or folder; correct the path or give a hub id.")
    if suffix not in FILE_BUILDERS:
        known = ", ".join(FILE_BUILDERS)
        raise UserError(f"--dataset_name '{name}' names files of an unknown kind; give a folder or files of {known}.")
    data_files = {"train": [glob.escape(file) for file in files]}
    return _load(FILE_BUILDERS[suffix], data_files=data_files, cache_dir=cache_dir)


def _load(*words: str | None, **options: Any) -> datasets.Dataset:
    """The train split by `datasets`, which keeps a copy as Arrow files in its cache; what is wrong there is said."""
    try:
        return datasets.load_dataset(*words, split="train", **options)
    except Exception as error:
        cause = _innermost(error)
        if getattr(cause, "errno", None) in NO_ROOM:
            raise UserError(
                f"--cache_dir: `datasets` cannot write its cache ({reason(error)}); free space or name a larger disk."
            ) from error
        folder = _damaged(words, options)
        if folder:
            raise UserError(damaged_cache(folder, reason(error))) from error
        raise


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _damaged(words: Sequence[str | None], options: Mapping[str, Any]) -> str | None:
    """The folder of the cache in which an earlier load finished this data set, if its files cannot be read now."""
    try:
        builder = datasets.load_dataset_builder(*words, **options)
    except Exception:  # then what is said of the data set cannot be read, or there is none
        root = Path(options["cache_dir"] or datasets.config.HF_DATASETS_CACHE).expanduser()
        infos = root.rglob(datasets.config.DATASET_INFO_FILENAME)
        return next((str(info.parent) for info in infos if not _is_json(info)), None)
    try:
        for file in Path(builder.cache_dir).glob("*.arrow"):
            datasets.Dataset.from_file(str(file))
    except (pa.ArrowException, OSError):
        return builder.cache_dir
    return None


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return True


def damaged_cache(folder: str, why: str) -> str:
    """The sentence that says so."""
    return f"{folder}, where `datasets` keeps the data set, is damaged ({why}); delete that folder: it is made anew."


def _saved_train_split(name: str, path: str) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(path)
    except IndexError as error:  # a saved data set without rows has no table at all
        raise UserError(f"--dataset_name '{name}' holds no rows; give a data set with rows.") from error
    if isinstance(saved, datasets.Dataset):
        return saved
    if "train" not in saved:
        raise UserError(f"--dataset_name '{name}' has no split 'train', only {', '.join(saved)}; rename one of them.")
    return saved["train"]


def with_columns(dataset: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
    """Only the columns that the flags (flag -> column) name.

    Raises:
        UserError: a column is missing, or zeros were written into its Arrow file.
    """
    if not set(columns.values()) <= set(dataset.column_names):
        dataset = dataset.flatten()  # members of a struct become columns: json.caption
    for flag, column in columns.items():
        if column not in dataset.column_names:
            existing = ", ".join(dataset.column_names)
            raise UserError(f"{flag} '{column}' is not a column of the data set; choose one of: {existing}.")
    dataset = dataset.select_columns(list(dict.fromkeys(columns.values())))
    _refuse_zeros(dataset)
    return dataset


def _refuse_zeros(dataset: datasets.Dataset) -> None:
    """Look for what zeros in an Arrow file make of it; reads the lengths of all values and the text, but no image."""
    table, why = dataset.data.table, ""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        why = reason(error)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not why and pa.types.is_string(column.type) and pc.any(pc.match_substring(column, "\0")).as_py():
            why = f"zeros in the text of {name}"
    if why:
        folder = os.path.dirname(dataset.cache_files[0]["filename"]) if dataset.cache_files else "the memory"
        raise UserError(damaged_cache(folder, why))
