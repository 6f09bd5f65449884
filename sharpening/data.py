"""Training data: loading, cropping, and latents and text embeddings computed once and kept on disk.

`load_captioned_images` finds a data set and `cache_latents_and_embeddings` encodes it; `load_prompts` and
`cache_embeddings` do the same for prompts without images. The `CachedData` that comes out is read by (row, draw
number), as `sharpening.draws.DrawSampler` counts them. A data set may be larger than memory: images pass through in
batches, and whatever is kept lies in Arrow files that are memory-mapped. What stays in memory is about 100 bytes per
distinct caption while the embeddings are written, and prompts themselves.
"""

import csv
import errno
import glob
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from sharpening.arguments import looks_local
from sharpening.draws import draw_generator
from sharpening.errors import UserError

FILE_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
# Part of every cache key: raise it when the meaning of what is stored changes.
CACHE_VERSION = 1
# PIL decodes and scales without holding the interpreter's lock; each thread holds one full-size picture.
DECODING_THREADS = 8

EncodeImages = Callable[[Tensor], Tensor]
EncodePrompts = Callable[[list[str]], tuple[Tensor, Tensor]]


# ---------------------------------------------------------------------------------------------------------- LOADING
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
    dataset = _load(dataset_name, dataset_config_name, train_data_dir, cache_dir)
    dataset = _with_columns(dataset, {"--image_column": image_column, "--caption_column": caption_column})
    dataset = _undecoded(dataset, image_column)
    if max_train_samples is not None and max_train_samples < len(dataset):
        # In memory: an indices file written beside the data would look like changed data to the next run.
        dataset = dataset.shuffle(seed=seed, keep_in_memory=True).select(range(max_train_samples))
    for _ in _captions(dataset, caption_column, "checking captions"):
        pass
    return dataset


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
        dataset = _load(dataset_name, dataset_config_name, train_data_dir, cache_dir)
        dataset = _with_columns(dataset, {"--caption_column": caption_column})
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
                    f"--caption_column '{caption_column}' holds {_shortened(caption)} in row {row} of {name}, not a "
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
            f"--prompts_file {path} cannot be read ({_reason(error)}); give a UTF-8 text file with a prompt on each "
            "line, or csv or jsonl."
        ) from error


def _load(
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
            f"{flag} '{name}' cannot be loaded as training data ({_reason(error)}); check that it exists, can be read "
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
    return datasets.load_dataset("imagefolder", data_files={"train": files}, split="train", cache_dir=cache_dir)


def _load_named(name: str, config_name: str | None, cache_dir: str | None) -> datasets.Dataset:
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if any(os.path.isfile(os.path.join(path, marker)) for marker in ("state.json", "dataset_dict.json")):
            return _saved_train_split(name, path)
        return datasets.load_dataset(path, config_name, split="train", cache_dir=cache_dir)
    suffix = Path(path).suffix
    if not (os.path.isfile(path) or glob.has_magic(path) or suffix in FILE_BUILDERS or looks_local(name)):
        return datasets.load_dataset(name, config_name, split="train", cache_dir=cache_dir)
    files = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    if not files:
        raise UserError(f"--dataset_name '{name}' names no file or folder; correct the path or give a hub id.")
    if suffix not in FILE_BUILDERS:
        known = ", ".join(FILE_BUILDERS)
        raise UserError(f"--dataset_name '{name}' names files of an unknown kind; give a folder or files of {known}.")
    data_files = {"train": [glob.escape(file) for file in files]}
    return datasets.load_dataset(FILE_BUILDERS[suffix], data_files=data_files, split="train", cache_dir=cache_dir)


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


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: `datasets` wraps the telling error in others that say little."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _with_columns(dataset: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
    """Only the columns that the flags (flag -> column) name."""
    if not set(columns.values()) <= set(dataset.column_names):
        dataset = dataset.flatten()  # members of a struct become columns: json.caption
    for flag, column in columns.items():
        if column not in dataset.column_names:
            existing = ", ".join(dataset.column_names)
            raise UserError(f"{flag} '{column}' is not a column of the data set; choose one of: {existing}.")
    return dataset.select_columns(list(dict.fromkeys(columns.values())))


def _undecoded(dataset: datasets.Dataset, image_column: str) -> datasets.Dataset:
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


def _captions(dataset: datasets.Dataset, caption_column: str, description: str) -> Iterator[list[str]]:
    """Every row's captions, reading nothing but their column, a thousand rows at a time."""
    column = dataset.select_columns([caption_column]).with_format("arrow")
    with tqdm(total=len(dataset), desc=description, unit="row", delay=1) as progress:
        row = 0
        for table in column.iter(batch_size=1000):
            for value in table.column(0).to_pylist():
                captions = value if isinstance(value, list) else [value]
                if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
                    raise UserError(
                        f"--caption_column '{caption_column}' holds {_shortened(value)} in {_row_name(dataset, row)}, "
                        "not a text or a list of texts; mend or remove that row, or name another column."
                    )
                yield captions
                row += 1
            progress.update(len(table))


def _shortened(value: object) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) < 60 else f"{text[:60]}..."


def _row_name(dataset: datasets.Dataset, row: int) -> str:
    """A row as the user counts it, from 0: before the shuffle of --max_train_samples."""
    shuffled = dataset._indices
    return f"row {row if shuffled is None else shuffled.column(0)[row].as_py()} of the data set"


# --------------------------------------------------------------------------------------------------- CROP AND RESIZE
def crop_and_resize(
    image: Image.Image, resolution: int, center_crop: bool, random_flip: bool, rng: torch.Generator
) -> tuple[Tensor, tuple[int, int, int, int, int, int]]:
    """A square of `image` for the VAE, and SDXL's micro-conditioning for exactly that square.

    The image is turned upright by its EXIF tag, put on white where it is transparent, brought to RGB, scaled so that
    its shorter side is `resolution` (R), perhaps mirrored, then cropped in the centre or at random.

    Returns:
        pixels (3, R, R) float32 in [-1, 1], and (original height, original width, crop top, crop left, R, R). The
        original size is that of the upright image. The corner counts in the scaled image as the model sees it, that
        is after mirroring: the pixels are that image's [top : top + R, left : left + R].

    Raises:
        ValueError: pixels of unknown range (mode F), or a picture so narrow that scaling it would flood the memory.
    """
    image = _to_rgb(ImageOps.exif_transpose(image))
    original_width, original_height = image.size
    shorter = min(image.size)
    width, height = original_width * resolution // shorter, original_height * resolution // shorter
    if Image.MAX_IMAGE_PIXELS is not None and width * height > max(Image.MAX_IMAGE_PIXELS, resolution**2):
        raise ValueError(f"it is {original_width} x {original_height}, too narrow for a square crop")
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    # Mirrored before the crop, so that the crop's corner needs no correction afterwards.
    if random_flip and torch.rand((), generator=rng) < 0.5:
        image = ImageOps.mirror(image)
    top, left = (
        round(spare / 2) if center_crop else int(torch.randint(spare + 1, (), generator=rng))
        for spare in (height - resolution, width - resolution)
    )
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels.contiguous(), (original_height, original_width, top, left, resolution, resolution)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of gray, which PIL's own conversion would clip at 255 rather than scale.
        values = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _read_image(stored: Mapping[str, Any]) -> Image.Image:
    data, path = stored["bytes"], stored["path"]
    if data is None and "://" in path:
        with fsspec.open(path, "rb") as file:
            data = file.read()
    elif data is None:
        data = Path(path).read_bytes()
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


# ------------------------------------------------------------------------------------------------- CACHES ON DISK
def cache_latents_and_embeddings(
    dataset: datasets.Dataset,
    *,
    image_column: str,
    caption_column: str,
    resolution: int,
    center_crop: bool,
    random_flip: bool,
    seed: int,
    encode_images: EncodeImages,
    encode_prompts: EncodePrompts,
    batch_size: int,
    key: Mapping[str, str],
    cache_dir: str | None,
    dtype: torch.dtype,
) -> "CachedData":
    """Encode every image once and every distinct caption once, unless an earlier call already did.

    Two caches, `latents-<hash>` and `embeddings-<hash>`, in `diffusion_sharpening` under `cache_dir` or else the
    cache folder of `datasets`. The hashes cover all that shapes the content, so a changed setting or file makes a new
    cache and never a wrong one. An interrupted call leaves nothing that is taken for a cache. Processes may call this
    at once: one encodes, the others wait for it.

    Args:
        dataset: as `load_captioned_images` returns it. Crop and flip of a row are drawn from (seed, row).
        encode_images: pixels (B, 3, R, R) float32 in [-1, 1] to latents (B, 4, h, w). `seed` is part of the latents'
            hash only where crop or flip is random; if the encoder draws by a seed, put that into `key`.
        encode_prompts: B texts to prompt embeddings (B, 77, D) and pooled embeddings (B, P).
        batch_size: B at most, for both encoders; it shapes no result and no hash.
        key: names and versions of the models. An entry whose name starts with "vae" shapes only the latents, with
            "text" only the embeddings, any other both.
        dtype: floating-point type in which both are stored.

    Raises:
        UserError: an unreadable image, an encoder result that is not finite, or a cache folder that takes no files.
    """
    dataset = _undecoded(dataset, image_column)
    root = _cache_root(cache_dir)
    crop = {"resolution": resolution, "center_crop": center_crop, "random_flip": random_flip}
    latents_key = {
        **_models(key, but="text"),
        **crop,
        "seed": seed if random_flip or not center_crop else None,
        "image_column": image_column,
        "dataset": dataset._fingerprint,
        "files": _file_stamps(dataset, image_column),
    }
    prepare = partial(_prepare, dataset, image_column, seed=seed, **crop)
    fill_latents = partial(_write_latents, dataset, image_column, prepare, encode_images, batch_size, dtype)
    latents = _cached(root, "latents", {**latents_key, "dtype": str(dtype)}, fill_latents)
    embeddings = _cached_embeddings(root, dataset, caption_column, encode_prompts, batch_size, key, dtype)
    return CachedData(embeddings, seed, latents)


def cache_embeddings(
    prompts: datasets.Dataset,
    *,
    encode_prompts: EncodePrompts,
    batch_size: int,
    key: Mapping[str, str],
    seed: int,
    cache_dir: str | None,
    dtype: torch.dtype,
) -> "CachedData":
    """Encode every prompt once, unless an earlier call already did; see `cache_latents_and_embeddings`.

    Raises:
        UserError: an encoder result that is not finite, or a cache folder that takes no files.
    """
    root = _cache_root(cache_dir)
    return CachedData(_cached_embeddings(root, prompts, "prompt", encode_prompts, batch_size, key, dtype), seed)


def _cache_root(cache_dir: str | None) -> Path:
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "diffusion_sharpening"


def _cached_embeddings(
    root: Path,
    dataset: datasets.Dataset,
    caption_column: str,
    encode_prompts: EncodePrompts,
    batch_size: int,
    key: Mapping[str, str],
    dtype: torch.dtype,
) -> Path:
    captions = _caption_digest(dataset, caption_column)
    parts = {**_models(key, but="vae"), "captions": captions, "dtype": str(dtype)}
    fill = partial(_write_embeddings, dataset, caption_column, encode_prompts, batch_size, dtype)
    return _cached(root, "embeddings", parts, fill)


def _models(key: Mapping[str, str], but: str) -> dict[str, str]:
    return {f"key.{name}": value for name, value in key.items() if not name.startswith(but)}


def _file_stamps(dataset: datasets.Dataset, image_column: str) -> str:
    """A digest of size and time of every file the images come from.

    A fingerprint alone does not see an Arrow file that was written again in place, nor an image replaced after the
    data set that names it was built. Paths of images that are embedded in the data are names only, without a file.
    """
    digest = hashlib.sha256()
    for file in sorted(entry["filename"] for entry in dataset.cache_files):
        digest.update(_stamp(file).encode())
    paths = dataset.select_columns([image_column]).flatten().select_columns([f"{image_column}.path"])
    with tqdm(total=len(dataset), desc="checking image files", unit="row", delay=1) as progress:
        for table in paths.with_format("arrow").iter(batch_size=1000):
            for path in table.column(0).to_pylist():
                digest.update(_stamp(path or "").encode())
            progress.update(len(table))
    return digest.hexdigest()


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return f"{path}\n"
    return f"{os.path.basename(path)} {status.st_size} {status.st_mtime_ns}\n"


def _caption_digest(dataset: datasets.Dataset, caption_column: str) -> str:
    digest = hashlib.sha256()
    for captions in _captions(dataset, caption_column, "hashing captions"):
        digest.update(json.dumps(captions).encode() + b"\n")
    return digest.hexdigest()


def _cached(root: Path, kind: str, parts: Mapping[str, object], fill: Callable[[Path], dict]) -> Path:
    """The folder `<kind>-<hash of parts>`; `fill` writes its files first if it is not there."""
    about = {"version": CACHE_VERSION, **parts}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    folder = root / f"{kind}-{name}"
    if folder.is_dir():
        return folder
    with _blamed_on_cache_dir():
        root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{folder.name}.lock"):
        if not folder.is_dir():  # another process may have filled it while this one waited
            partial_folder = root / f"{folder.name}.partial"
            # A killed run left it: whoever writes holds the lock, and that is this process.
            shutil.rmtree(partial_folder, ignore_errors=True)
            with _blamed_on_cache_dir():
                partial_folder.mkdir()
            try:
                shapes = fill(partial_folder)
                with _blamed_on_cache_dir():
                    (partial_folder / "about.json").write_text(json.dumps({**about, "shapes": shapes}, indent=2))
                    partial_folder.rename(folder)
            finally:
                shutil.rmtree(partial_folder, ignore_errors=True)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system frees it when that process dies."""
    lock = FileLock(path)
    with _blamed_on_cache_dir():
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _blamed_on_cache_dir() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = (
            "free space or name a larger disk" if error.errno == errno.ENOSPC else "name a folder you can write to"
        )
        raise UserError(f"--cache_dir: the cache cannot be written ({_reason(error)}); {remedy}.") from error


class _ArrowFile:
    """An Arrow stream on disk to which rows are added; a context manager. At most `rows_per_batch` are held."""

    def __init__(self, path: Path, schema: Mapping[str, pa.DataType], rows_per_batch: int):
        self.schema, self.rows_per_batch, self.rows = pa.schema(list(schema.items())), rows_per_batch, []
        with _blamed_on_cache_dir():
            self.file = pa.OSFile(str(path), "wb")
            self.stream = pa.ipc.new_stream(self.file, self.schema)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        if len(self.rows) >= self.rows_per_batch:
            self._flush()

    def _flush(self) -> None:
        with _blamed_on_cache_dir():
            self.stream.write_batch(pa.RecordBatch.from_pylist(self.rows, self.schema))
        self.rows.clear()

    def __enter__(self) -> "_ArrowFile":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                with _blamed_on_cache_dir():
                    self.stream.close()
        finally:
            self.file.close()


def _prepare(
    dataset: datasets.Dataset,
    image_column: str,
    row: int,
    stored: Mapping[str, Any] | None,
    *,
    resolution: int,
    center_crop: bool,
    random_flip: bool,
    seed: int,
) -> tuple[Tensor, tuple[int, ...]]:
    """`crop_and_resize` of one stored image, with crop and flip drawn from (seed, row)."""
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        place = _row_name(dataset, row)
        raise UserError(f"--image_column '{image_column}' holds no image in {place}; remove the row or add its image.")
    try:
        image = _read_image(stored)
        return crop_and_resize(image, resolution, center_crop, random_flip, draw_generator(seed, row, "crop"))
    # Decoders raise anything on damaged bytes: OSError, SyntaxError, struct.error, a decompression bomb...
    except Exception as error:
        where = _row_name(dataset, row) + (f" ('{stored['path']}')" if stored["path"] else "")
        raise UserError(
            f"--image_column '{image_column}': the image in {where} cannot be read ({_reason(error)}); "
            "remove or replace it."
        ) from error


@torch.no_grad()
def _write_latents(
    dataset: datasets.Dataset,
    image_column: str,
    prepare: Callable[[int, Mapping[str, Any]], tuple[Tensor, tuple[int, ...]]],
    encode_images: EncodeImages,
    batch_size: int,
    dtype: torch.dtype,
    folder: Path,
) -> dict[str, list[int]]:
    """Write `rows.arrow`, a latent and its time ids per row; returns the shape of a latent."""
    images = dataset.select_columns([image_column])
    shape: list[int] = []
    with (
        _ArrowFile(folder / "rows.arrow", {"latents": pa.binary(), "time_ids": pa.list_(pa.int32())}, 64) as file,
        ThreadPoolExecutor(DECODING_THREADS) as pool,
        tqdm(total=len(images), desc="encoding images", unit="image") as progress,
    ):
        for start in range(0, len(images), batch_size):
            stored = images[start : start + batch_size][image_column]
            pixels, time_ids = zip(*pool.map(prepare, range(start, start + len(stored)), stored), strict=True)
            latents = _finite(encode_images(torch.stack(pixels)), dtype, "images", f"rows from {start}")
            for latent, ids in zip(latents, time_ids, strict=True):
                file.add({"latents": _to_bytes(latent), "time_ids": ids})
            shape = list(latents.shape[1:])
            progress.update(len(stored))
    return {"latents": shape}


@torch.no_grad()
def _write_embeddings(
    dataset: datasets.Dataset,
    caption_column: str,
    encode_prompts: EncodePrompts,
    batch_size: int,
    dtype: torch.dtype,
    folder: Path,
) -> dict[str, list[int]]:
    """Write `captions.arrow`, a row per distinct caption, and `rows.arrow`, which of them every row has."""
    numbers: dict[bytes, int] = {}  # digest of a caption -> its row in captions.arrow
    waiting: list[str] = []
    shapes: dict[str, list[int]] = {}
    schema = {"caption": pa.string(), "prompt_embeds": pa.binary(), "pooled_prompt_embeds": pa.binary()}
    with (
        _ArrowFile(folder / "captions.arrow", schema, 64) as captions_file,
        _ArrowFile(folder / "rows.arrow", {"captions": pa.list_(pa.int32())}, 4096) as rows_file,
    ):
        for captions in _captions(dataset, caption_column, "encoding captions"):
            digests = [hashlib.blake2b(caption.encode(), digest_size=16).digest() for caption in captions]
            for caption, digest in zip(captions, digests, strict=True):
                if digest in numbers:
                    continue
                numbers[digest] = len(numbers)
                waiting.append(caption)
                if len(waiting) == batch_size:
                    shapes = _add_captions(captions_file, waiting, encode_prompts, dtype)
                    waiting = []
            rows_file.add({"captions": [numbers[digest] for digest in digests]})
        if waiting:
            shapes = _add_captions(captions_file, waiting, encode_prompts, dtype)
    return shapes


def _add_captions(
    file: _ArrowFile, captions: list[str], encode_prompts: EncodePrompts, dtype: torch.dtype
) -> dict[str, list[int]]:
    """Encode and store a batch; returns the shapes of one caption's embeddings."""
    embeds, pooled = (_finite(part, dtype, "captions", repr(captions[0])) for part in encode_prompts(captions))
    for caption, embed, pool in zip(captions, embeds, pooled, strict=True):
        file.add({"caption": caption, "prompt_embeds": _to_bytes(embed), "pooled_prompt_embeds": _to_bytes(pool)})
    return {"prompt_embeds": list(embeds.shape[1:]), "pooled_prompt_embeds": list(pooled.shape[1:])}


def _finite(encoded: Tensor, dtype: torch.dtype, what: str, where: str) -> Tensor:
    """`encoded` on the CPU in `dtype`; a cache of NaN would poison every later run."""
    encoded = encoded.to("cpu", dtype)
    if not encoded.isfinite().all():
        raise UserError(
            f"--mixed_precision: encoding {what} gave values that are not finite ({where}); use bf16 or no, or for "
            "SDXL's VAE in fp16 name a VAE made for it by --pretrained_vae_model_name_or_path."
        )
    return encoded


def _to_bytes(tensor: Tensor) -> bytes:
    # By way of uint8, because numpy has no bfloat16.
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# -------------------------------------------------------------------------------------------------- READING BACK
class CachedData(torch.utils.data.Dataset):
    """The encoded data set, read by (row, draw number) from memory-mapped files; prompts alone have no latents."""

    def __init__(self, embeddings: Path, seed: int, latents: Path | None = None):
        folders = [embeddings] if latents is None else [embeddings, latents]
        about = [json.loads((folder / "about.json").read_text()) for folder in folders]
        self.shapes: dict[str, list[int]] = {name: shape for part in about for name, shape in part["shapes"].items()}
        self.dtype: torch.dtype = getattr(torch, about[0]["dtype"].removeprefix("torch."))
        self.seed = seed
        self.latents = None if latents is None else datasets.Dataset.from_file(str(latents / "rows.arrow"))
        self.captions_of_rows = datasets.Dataset.from_file(str(embeddings / "rows.arrow"))
        self.captions = datasets.Dataset.from_file(str(embeddings / "captions.arrow"))

    def __len__(self) -> int:
        return len(self.captions_of_rows)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        """One draw of one row, alike in every process and worker.

        Args:
            draw: (row, draw number); of a row with several captions, (seed, draw number) chooses one.

        Returns:
            `prompt_embeds` (77, D) and `pooled_prompt_embeds` (P,) in the stored dtype, `caption` str and `draw` int;
            of images also `latents` (4, h, w) in that dtype and `time_ids` (6,) float32 as of `crop_and_resize`.
        """
        row, number = draw
        choices: Sequence[int] = self.captions_of_rows[row]["captions"]
        choice = torch.randint(len(choices), (), generator=draw_generator(self.seed, number, "caption"))
        caption = self.captions[choices[int(choice)]]
        result = {
            "prompt_embeds": self._tensor("prompt_embeds", caption),
            "pooled_prompt_embeds": self._tensor("pooled_prompt_embeds", caption),
            "caption": caption["caption"],
            "draw": number,
        }
        if self.latents is not None:
            stored = self.latents[row]
            result["latents"] = self._tensor("latents", stored)
            result["time_ids"] = torch.tensor(stored["time_ids"], dtype=torch.float32)
        return result

    def _tensor(self, name: str, stored: Mapping[str, Any]) -> Tensor:
        return torch.frombuffer(bytearray(stored[name]), dtype=self.dtype).reshape(self.shapes[name])


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of B rows of `CachedData`: tensors stacked, `caption` list[str] of length B, `draw` (B,) int64."""
    tensors = [name for name, value in rows[0].items() if isinstance(value, Tensor)]
    batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in tensors}
    batch["caption"] = [row["caption"] for row in rows]
    batch["draw"] = torch.tensor([row["draw"] for row in rows], dtype=torch.int64)
    return batch
