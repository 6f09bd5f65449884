"""Images with captions as training data: the data set, its captions and its images, each read when it is needed."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import fsspec
from PIL import Image
from tqdm.auto import tqdm

from sharpening.data.dataset_loading import load_train_split, with_columns
from sharpening.errors import UserError, shortened
from sharpening.progress import progress


def load_captioned_images(
    *,
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    image_column: str,
    caption_column: str,
    max_train_samples: int | None,
    seed: int,
    cache_dir: str | None,
) -> datasets.Dataset:
    """The training split, reduced to its image column (undecoded: `{"bytes", "path"}`) and its caption column.

    Args:
        dataset_name: hub id, a folder (`save_to_disk` output, or anything `load_dataset` reads), a parquet or
            webdataset tar file, or a glob of such files.
        train_data_dir: an image folder with its metadata file, instead of `dataset_name`.
        image_column, caption_column: a member of webdataset's JSON is written `json.caption`. A caption is a
            non-empty string or a list of such.
        max_train_samples: that many rows (at least 1), after a shuffle by `seed`.

    Raises:
        UserError: no such data, no train split, no rows, a missing column, or a caption that is no text.
    """
    dataset = load_train_split(dataset_name, dataset_config_name, train_data_dir, cache_dir)
    dataset = with_columns(dataset, {"--image_column": image_column, "--caption_column": caption_column})
    dataset = undecoded(dataset, image_column)
    if max_train_samples is not None and max_train_samples < len(dataset):
        # In memory: an indices file written beside the data would look like changed data to the next run.
        dataset = dataset.shuffle(seed=seed, keep_in_memory=True).select(range(max_train_samples))
    bar = progress(total=len(dataset), desc="checking captions", unit="row", delay=1)
    for _ in read_captions(dataset, caption_column, bar):
        pass
    return dataset


def undecoded(dataset: datasets.Dataset, image_column: str) -> datasets.Dataset:
    """The same rows, reading one of which does not decode its image."""
    feature = dataset.features[image_column]
    encoded_types = ("binary", "large_binary", "string", "large_string")
    is_encoded = isinstance(feature, datasets.Value) and feature.dtype in encoded_types
    is_struct = isinstance(feature, dict) and bool(feature) and set(feature) <= {"bytes", "path"}
    if not (isinstance(feature, datasets.Image) or is_encoded or is_struct):
        raise UserError(f"--image_column '{image_column}' holds {feature}, not images; name the column of the images.")
    if isinstance(feature, datasets.Image) and not feature.decode:
        return dataset
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def read_captions(dataset: datasets.Dataset, caption_column: str, bar: tqdm) -> Iterator[list[str]]:
    """Every row's captions, reading nothing but their column, a thousand rows at a time; `bar` counts rows."""
    column = dataset.select_columns([caption_column]).with_format("arrow")
    with bar:
        row = 0
        for table in column.iter(batch_size=1000):
            for value in table.column(0).to_pylist():
                captions = value if isinstance(value, list) else [value]
                if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
                    raise UserError(
                        f"--caption_column '{caption_column}' holds {shortened(value)} in {row_name(dataset, row)}, "
                        "not a text or a list of texts; mend or remove that row, or name another column."
                    )
                yield captions
                row += 1
            bar.update(len(table))


def row_name(dataset: datasets.Dataset, row: int) -> str:
    """A row as the user counts it, from 0: before the shuffle of --max_train_samples."""
    shuffled = dataset._indices
    return f"row {row if shuffled is None else shuffled.column(0)[row].as_py()} of the data set"


def read_image(stored: Mapping[str, Any]) -> Image.Image:
    """The image of an undecoded row: from its bytes or, without any, from the file or the address that it names."""
    data, path = stored["bytes"], stored["path"]
    if data is None and "://" in path:
        with fsspec.open(path, "rb") as file:
            data = file.read()
    elif data is None:
        data = Path(path).read_bytes()
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
