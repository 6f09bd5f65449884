"""How figures are reported: the machine that they were measured on, and ratios with their spread."""

import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch


def describe_machine() -> str:
    """One line: processor and its cores that this process may use, memory, GPU, threads and version of torch."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [f"{processor}, {len(os.sched_getaffinity(0))} cores", f"{memory:.0f} GiB"]
    if torch.cuda.is_available():
        parts.append(
            f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
        )
    parts.append(f"torch {torch.__version__} with {torch.get_num_threads()} threads")
    return ", ".join(parts)


def spread(ratios: Sequence[float]) -> str:
    """The median of ratios and their range."""
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
