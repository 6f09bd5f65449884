"""What the terminal shows of work that takes more than a moment."""

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import torch
from tqdm.auto import tqdm

PATIENCE = 2.0  # seconds


class _Heedless:
    """A text file for which what cannot be written is lost: a full disk under a log must not end a run."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __eq__(self, other: object) -> bool:
        return self.file == other  # tqdm clears the bars that lie in the file it writes to

    __hash__ = None

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.file.flush()


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A bar of tqdm with these options, which the main process alone shows: the others do the same work."""
    return tqdm(iterable, disable=not _is_main(), file=_Heedless(sys.stderr), **options)


@contextmanager
def underway(what: str) -> Iterator[None]:
    """Says what is being done, in a line, if it takes more than `PATIENCE` seconds: for work of another library that
    counts no parts, so has no rate."""
    said = threading.Timer(PATIENCE, tqdm.write, [f"{what} ...", _Heedless(sys.stderr)])
    said.daemon = True
    if _is_main():
        said.start()
    try:
        yield
    finally:
        said.cancel()


def _is_main() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
