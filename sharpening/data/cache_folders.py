"""Folders of Arrow files named by a hash of what shaped them: filled once, by one process, whole or not at all."""

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from sharpening.errors import UserError, reason
from sharpening.files import write_aside

# Part of every cache key: raise it when the meaning of what is stored changes.
CACHE_VERSION = 1


def cache_folder(root: Path, kind: str, parts: Mapping[str, object], fill: Callable[[Path], dict]) -> Path:
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
            with write_aside(folder) as aside:
                with _blamed_on_cache_dir():
                    aside.mkdir()
                shapes = fill(aside)
                with _blamed_on_cache_dir():
                    (aside / "about.json").write_text(json.dumps({**about, "shapes": shapes}, indent=2))
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
            self.file.close()
