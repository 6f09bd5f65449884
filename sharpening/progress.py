"""Progress bars of work that takes more than a moment."""

from collections.abc import Iterable
from typing import Any

import torch
from tqdm.auto import tqdm


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A bar of tqdm with these options, which the main process alone shows: the others do the same work."""
    is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return tqdm(iterable, disable=not is_main, **options)
