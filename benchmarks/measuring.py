"""Instruments: seconds by phase, operators dispatched, memory at the peak, and how fast a matrix product is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import LiveMemory


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


class Clock:
    """Seconds by phase; time inside an inner phase is not that of the outer one, time outside of all is "rest"."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._stack = ["rest"]
        self._since = 0.0

    def start(self) -> None:
        """Forget what was counted."""
        synchronise()
        self._seconds, self._since = {}, time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Seconds by phase since the start; their sum is all the time that has passed."""
        self._charge()
        return dict(self._seconds)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within as that of a phase."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        synchronise()
        now = time.perf_counter()
        self._seconds[self._stack[-1]] = self._seconds.get(self._stack[-1], 0.0) + now - self._since
        self._since = now


@cache
def is_view(function: torch._ops.OpOverload) -> bool:
    """Whether an operator returns a view of its input, such as `view`, `t` and `detach`: it moves no data."""
    # The schema of _unsafe_view does not say that it is one.
    return function.is_view or function is torch.ops.aten._unsafe_view.default


class OperatorCount(TorchDispatchMode):
    """A context that counts the operators dispatched within it, those of backward passes too.

    Views (`is_view`) are not counted. A fused operator counts once, whatever it does.

    Attributes:
        names: how often each operator was dispatched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.names.total()

    def __torch_dispatch__(
        self,
        function: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not is_view(function):
            self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


@dataclass
class Peak:
    """Memory at the peak, in bytes beyond those held before; known once the context that gave it has ended."""

    size: int = 0


SECONDS_OF_A_PRODUCT = 5.0  # that `matmul_peak` is willing to wait for one


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """The peak of memory within: on a GPU by the allocator, on a CPU by counting tensors."""
    peak = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak.size = torch.cuda.max_memory_allocated() - before
        return
    with LiveMemory() as memory:
        yield peak
    peak.size = memory.peak


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of five; of a smaller one where the dtype has no instructions."""

    def best(size: int) -> float:
        left, right = torch.randn(2, size, size, device=device, dtype=dtype)
        return 2 * size**3 / min(timed(lambda: left @ right) for _ in range(5))

    small = best(512)
    large = 8192 if device.type == "cuda" else 2048
    return best(large) if 2 * large**3 / small < SECONDS_OF_A_PRODUCT else small
