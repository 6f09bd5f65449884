"""Between host and device without waiting: copies of what the host knows, and rows that the host chose."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Index = Tensor | slice  # of rows: a tensor on the CPU, or neighbours, which cost no copy
Agree = Callable[[int], int]  # how many forwards all processes make where this one needs so many


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, copied behind what the device has still to do: from pinned memory, on CUDA."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # Pinned as it is, an expanded tensor cannot be written, and a strided one would be copied through pageable memory.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def alone(count: int) -> int:
    """As many forwards as this process needs, which knows no other."""
    return count


def slices(count: int, size: int) -> Iterator[slice]:
    """Rows 0 to `count`, `size` at a time."""
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def take(parts: Iterable[Tensor | None], index: Index) -> list[Tensor | None]:
    """The rows that `index` names of every part, wherever it lies; the index is copied once to each device."""
    copies: dict[torch.device, Index] = {}

    def rows(part: Tensor) -> Tensor:
        if isinstance(index, slice):
            return part[index]
        if part.device not in copies:
            copies[part.device] = upload(index, part.device)
        return part[copies[part.device]]

    return [None if part is None else rows(part) for part in parts]
