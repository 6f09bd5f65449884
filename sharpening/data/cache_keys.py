"""What names a cache of encoded data: the models, the files that images come from, the captions."""

import hashlib
import json
import os
from collections.abc import Mapping

import datasets

from sharpening.data.captioned_images import read_captions
from sharpening.progress import progress


def models(key: Mapping[str, str], but: str) -> dict[str, str]:
    """The entries of a key whose names do not start with `but`, named apart from all other parts of a cache key."""
    return {f"key.{name}": value for name, value in key.items() if not name.startswith(but)}


def file_stamps(dataset: datasets.Dataset, image_column: str) -> str:
    """A digest of size and time of every file the images come from.

    A fingerprint alone does not see an Arrow file that was written again in place, nor an image replaced after the
    data set that names it was built. Paths of images that are embedded in the data are names only, without a file.
    """
    digest = hashlib.sha256()
    for file in sorted(entry["filename"] for entry in dataset.cache_files):
        digest.update(_stamp(file).encode())
    paths = dataset.select_columns([image_column]).flatten().select_columns([f"{image_column}.path"])
    with progress(total=len(dataset), desc="checking image files", unit="row", delay=1) as bar:
        for table in paths.with_format("arrow").iter(batch_size=1000):
            for path in table.column(0).to_pylist():
                digest.update(_stamp(path or "").encode())
            bar.update(len(table))
    return digest.hexdigest()


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return f"{path}\n"
    return f"{os.path.basename(path)} {status.st_size} {status.st_mtime_ns}\n"


def caption_digest(dataset: datasets.Dataset, caption_column: str) -> str:
    """A digest of every row's captions, in order."""
    digest = hashlib.sha256()
    bar = progress(total=len(dataset), desc="hashing captions", unit="row", delay=1)
    for captions in read_captions(dataset, caption_column, bar):
        digest.update(json.dumps(captions).encode() + b"\n")
    return digest.hexdigest()
