"""Whether `torch.compile` of the transformer blocks pays: launches and CPU time of a UNet, with it and without.

    python benchmarks/compiling.py --model mid --resolution 64 --rows 1
    python benchmarks/compiling.py --model mid --resolution 64 --rows 1 --use_lora

Every BasicTransformerBlock is compiled by itself (diffusers' `compile_repeated_blocks`), for each shape anew; what
lies between them stays as it is. All is on the CPU; weights are random. The passes are a forward without gradient,
several of them under one autocast, as the scripts generate and score, and a forward with its backward.

A launch is an operator that is no view, as `benchmarks/measuring.py` counts, or a kernel that inductor generated,
which is no operator. Inductor generates other kernels for a GPU, so their number there may differ. Time is the
processor's, which other work on the machine disturbs less. A processor without instructions for bf16 spends most of
it on matrix products; there `--mixed_precision no` tells more.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch._inductor import config
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import OperatorCount, timed
from benchmarks.models import SIZES, write_pipeline
from benchmarks.reporting import describe_machine, spread
from benchmarks.rivals import DTYPES, random_condition
from sharpening import sdxl
from sharpening.errors import exit_status
from sharpening.flags import Flag, parse
from sharpening.model_source import Source

PASSES = ("forward", "forwards", "train")
CPU = torch.device("cpu")
FLAGS = (
    Flag("model", "its size", default="mid", choices=SIZES),
    Flag("resolution", "pixels", int, 256, "[1, inf)"),
    Flag("rows", "rows of a forward", int, 4, "[1, inf)"),
    Flag("forwards", "how many are under one autocast in the pass of that name", int, 9, "[1, inf)"),
    Flag("mixed_precision", "of the scripts", default="bf16", choices=("no", "bf16")),
    Flag("use_lora", "an adapter trains, and the weights beneath it are in that precision", bool, False),
    Flag("passes", "what to measure", default=PASSES, choices=PASSES, nargs="+"),
    Flag("rounds", "pairs that are timed", int, 5, "[1, inf)"),
    Flag("output", "write every figure here as JSON", Path),
)


class _Operators(OperatorCount):
    """Operators, compiled code running on: within another mode a compiled function would run as if it were not."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def launches(work: Callable[[], object]) -> tuple[int, int]:
    """Operators that are no views, and generated kernels, of a call that has been made before: compiled by now.

    Kernels are known by what `config.cpp.enable_kernel_profile`, on when they were compiled, says to the profiler.
    """
    with _Operators() as operators:
        work()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:  # apart: within, compiled code has operators for it
        work()
    return operators.total, sum(event.count for event in profiler.key_averages() if "cpp_fused" in event.key)


def works(
    unet: UNet2DConditionModel, dtype: torch.dtype, resolution: int, rows: int, forwards: int
) -> dict[str, Callable[[], None]]:
    """The passes by name, each a function that does it."""
    size = resolution // 8
    autocast = partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
    x, t = torch.randn(rows, 4, size, size), torch.full((rows,), 500)
    condition = random_condition(unet, rows, resolution)

    @torch.no_grad()
    def without_gradient(times: int) -> None:
        with autocast():
            for _ in range(times):
                sdxl.predict_output(unet, x, t, condition)

    def train() -> None:
        with autocast():
            output = sdxl.predict_output(unet, x, t, condition)
        output.square().mean().backward()
        unet.zero_grad()

    return {"forward": lambda: without_gradient(1), "forwards": lambda: without_gradient(forwards), "train": train}


def processor_seconds(work: Callable[[], None]) -> float:
    """What a call takes of all cores together."""
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(eager: Callable[[], None], compiled: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Launches of both and, in turns, their seconds of the processor.

    "compiling" is how long the first call of the compiled one took.
    """
    eager()
    found: dict[str, Any] = {"eager": sum(launches(eager)), "compiling": timed(compiled)}
    found["operators"], found["generated"] = launches(compiled)
    found["seconds"] = [(processor_seconds(eager), processor_seconds(compiled)) for _ in range(rounds)]
    return found


def report(name: str, found: dict[str, Any]) -> str:
    """The figures of a pass as text."""
    compiled = found["operators"] + found["generated"]
    ratios = [with_it / without for without, with_it in found["seconds"]]
    return (
        f"{name:>9}  launches {found['eager']} and compiled {compiled}, {found['generated']} of them generated: "
        f"{compiled / found['eager']:.2f}x; CPU time {spread(ratios)}, {found['compiling']:.0f} s to compile"
    )


def main(argv: list[str]) -> int:
    """Measure, print, write; returns the exit status."""
    args = parse(__doc__.splitlines()[0], {"compiling": FLAGS}, argv)
    dtype = DTYPES[args.mixed_precision]
    with tempfile.TemporaryDirectory() as folder:
        write_pipeline(args.model, Path(folder), torch.float32)
        adapter = sdxl.lora_config(16, None) if args.use_lora else None
        source = Source("pretrained_model_name_or_path", folder)
        eager = sdxl.load_unet(source, CPU, dtype, adapter)
    compiled, found = copy.deepcopy(eager), {}
    compiled.compile_repeated_blocks(fullgraph=True, dynamic=False)  # fullgraph: what cannot be compiled is an error
    print(f"{describe_machine()}; {' '.join(argv)}")
    with config.patch("cpp.enable_kernel_profile", True):
        both = [works(unet, dtype, args.resolution, args.rows, args.forwards) for unet in (eager, compiled)]
        for name in args.passes:
            found[name] = compare(*(of_unet[name] for of_unet in both), args.rounds)
            print(report(name, found[name]), flush=True)
    if args.output:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.output.write_text(json.dumps({"machine": describe_machine(), "settings": settings, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
