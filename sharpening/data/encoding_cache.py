"""Latents and text embeddings computed once, kept on disk, and read back as batches.

`cache_latents_and_embeddings` encodes captioned images and `cache_embeddings` prompts alone. The `CachedData` that
comes out is read by (row, draw number), as `sharpening.draws.DrawSampler` counts them. A data set may be larger than
memory: images pass through in batches, and whatever is kept lies in Arrow files that are memory-mapped. What stays in
memory is about 100 bytes per distinct caption while the embeddings are written, and prompts themselves.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sharpening.data.cache_folders import ArrowFile, cache_folder
from sharpening.data.cache_keys import caption_digest, file_stamps, models
from sharpening.data.captioned_images import read_captions, read_image, row_name, undecoded
from sharpening.data.cropping import crop_and_resize
from sharpening.draws import draw_generator
from sharpening.errors import UserError, reason

# PIL decodes and scales without holding the interpreter's lock; each thread holds one full-size picture.
DECODING_THREADS = 8

EncodeImages = Callable[[Tensor], Tensor]
EncodePrompts = Callable[[list[str]], tuple[Tensor, Tensor]]


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
    dataset = undecoded(dataset, image_column)
    root = _cache_root(cache_dir)
    crop = {"resolution": resolution, "center_crop": center_crop, "random_flip": random_flip}
    latents_key = {
        **models(key, but="text"),
        **crop,
        "seed": seed if random_flip or not center_crop else None,
        "image_column": image_column,
        "dataset": dataset._fingerprint,
        "files": file_stamps(dataset, image_column),
    }
    prepare = partial(_prepare, dataset, image_column, seed=seed, **crop)
    fill_latents = partial(_write_latents, dataset, image_column, prepare, encode_images, batch_size, dtype)
    latents = cache_folder(root, "latents", {**latents_key, "dtype": str(dtype)}, fill_latents)
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
    captions = caption_digest(dataset, caption_column)
    parts = {**models(key, but="vae"), "captions": captions, "dtype": str(dtype)}
    fill = partial(_write_embeddings, dataset, caption_column, encode_prompts, batch_size, dtype)
    return cache_folder(root, "embeddings", parts, fill)


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
        place = row_name(dataset, row)
        raise UserError(f"--image_column '{image_column}' holds no image in {place}; remove the row or add its image.")
    try:
        image = read_image(stored)
        return crop_and_resize(image, resolution, center_crop, random_flip, draw_generator(seed, row, "crop"))
    # Decoders raise anything on damaged bytes: OSError, SyntaxError, struct.error, a decompression bomb...
    except Exception as error:
        where = row_name(dataset, row) + (f" ('{stored['path']}')" if stored["path"] else "")
        raise UserError(
            f"--image_column '{image_column}': the image in {where} cannot be read ({reason(error)}); "
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
        ArrowFile(folder / "rows.arrow", {"latents": pa.binary(), "time_ids": pa.list_(pa.int32())}, 64) as file,
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
        ArrowFile(folder / "captions.arrow", schema, 64) as captions_file,
        ArrowFile(folder / "rows.arrow", {"captions": pa.list_(pa.int32())}, 4096) as rows_file,
    ):
        # Shown wherever it runs: one process encodes, and the others wait for it.
        bar = tqdm(total=len(dataset), desc="encoding captions", unit="row", delay=1)
        for captions in read_captions(dataset, caption_column, bar):
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
    file: ArrowFile, captions: list[str], encode_prompts: EncodePrompts, dtype: torch.dtype
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
        return result if self.latents is None else {**result, **self.image(row)}

    def image(self, row: int) -> dict[str, Tensor]:
        """`latents` and `time_ids` of a row."""
        stored = self.latents[row]
        time_ids = torch.tensor(stored["time_ids"], dtype=torch.float32)
        return {"latents": self._tensor("latents", stored), "time_ids": time_ids}

    def _tensor(self, name: str, stored: Mapping[str, Any]) -> Tensor:
        return torch.frombuffer(bytearray(stored[name]), dtype=self.dtype).reshape(self.shapes[name])


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of B rows of `CachedData`: tensors stacked, `caption` list[str] of length B, `draw` (B,) int64."""
    tensors = [name for name, value in rows[0].items() if isinstance(value, Tensor)]
    batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in tensors}
    batch["caption"] = [row["caption"] for row in rows]
    batch["draw"] = torch.tensor([row["draw"] for row in rows], dtype=torch.int64)
    return batch
