"""What the terminal shows of work that takes more than a moment."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A bar of tqdm with these options, which the main process alone shows: the others do the same work."""
    is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return tqdm(iterable, disable=not is_main, **options)


@contextmanager
def underway(what: str) -> Iterator[None]:
    """Shows what is being done until it is done: for work of another library that counts no parts, so has no rate."""
    with progress(total=1, desc=what, bar_format="{desc} ...", leave=False):
        yield
