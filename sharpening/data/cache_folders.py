"""Folders of Arrow files named by a hash of what shaped them: filled once, by one process, whole or not at all, and
made anew if they are damaged."""

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from sharpening.errors import NO_ROOM, UserError, first_line, reason
from sharpening.files import write_aside
from sharpening.progress import progress

logger = logging.getLogger(__name__)

# Part of every cache key: raise it when the meaning of what is stored changes.
CACHE_VERSION = 1
ABOUT_FILE = "about.json"
CHUNK = 2**24  # bytes that have a checksum of their own
CHECKED_CHUNKS = 512  # at most, evenly spread over a file: 8 GiB take seconds, all of a large cache would take hours
CHECKING_THREADS = 4


def cache_folder(root: Path, kind: str, parts: Mapping[str, object], fill: Callable[[Path], dict]) -> Path:
    """The folder `<kind>-<hash of parts>`; `fill` writes its files first if it is not there or is damaged.

    Damage is a file of another size, or a chunk of other bytes than were written; of a file of more than 512 chunks
    (8 GiB) so many are looked at. It is warned of.

    Raises:
        UserError: the folder cannot be written.
    """
    about = {"version": CACHE_VERSION, **parts}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    folder = root / f"{kind}-{name}"
    existed = folder.is_dir()
    damage = _damage(folder) if existed else ""
    if existed and not damage:
        return folder
    if damage:
        logger.warning(f"the cache {folder} is damaged ({damage}) and is made anew")
    with _blamed_on_cache_dir():
        root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{folder.name}.lock"):
        # Another process may have filled or mended it while this one waited.
        if folder.is_dir() and existed and _damage(folder):
            shutil.rmtree(folder)
        if not folder.is_dir():
            _fill(folder, about, fill)
    return folder


def _fill(folder: Path, about: Mapping[str, object], fill: Callable[[Path], dict]) -> None:
    with write_aside(folder) as aside:
        with _blamed_on_cache_dir():
            aside.mkdir()
        shapes = fill(aside)
        with _blamed_on_cache_dir():
            files = {path.name: _checksums(path) for path in sorted(aside.iterdir())}
            (aside / ABOUT_FILE).write_text(json.dumps({**about, "shapes": shapes, "files": files}, indent=2))


def _checksums(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "crc32": _crc32(path, range(_count_chunks(size)))}


def _count_chunks(size: int) -> int:
    return -(-size // CHUNK)


def _crc32(path: Path, chunks: Sequence[int]) -> list[int]:
    """The checksums of some chunks of a file; zlib lets go of the interpreter's lock meanwhile."""
    with path.open("rb") as file, ThreadPoolExecutor(CHECKING_THREADS) as pool:
        sums = pool.map(lambda chunk: zlib.crc32(os.pread(file.fileno(), CHUNK, chunk * CHUNK)), chunks)
        return list(progress(sums, total=len(chunks), desc=f"checksums of {path.name}", unit="chunk", delay=1))


def _damage(folder: Path) -> str:
    """What is wrong with a folder, or nothing."""
    try:
        for name, kept in json.loads((folder / ABOUT_FILE).read_text())["files"].items():
            size = (folder / name).stat().st_size
            if size != kept["bytes"]:
                return f"{name} has {size} of {kept['bytes']} bytes"
            count = _count_chunks(size)
            some = sorted({chunk * count // min(count, CHECKED_CHUNKS) for chunk in range(min(count, CHECKED_CHUNKS))})
            if _crc32(folder / name, some) != [kept["crc32"][chunk] for chunk in some]:
                return f"{name} holds other bytes than were written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return f"{ABOUT_FILE} cannot be used: {first_line(error)}"
    return ""


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
        remedy = "free space or name a larger disk" if error.errno in NO_ROOM else "name a folder you can write to"
        raise UserError(f"--cache_dir: the cache cannot be written ({reason(error)}); {remedy}.") from error


class ArrowFile:
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

    def __enter__(self) -> "ArrowFile":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._flush()
                with _blamed_on_cache_dir():
                    self.stream.close()
        finally:
            with _blamed_on_cache_dir():
                self.file.close()
