"""What an optimizer step costs: seconds by phase, FLOPs and peak memory, against a literal reading and fine-tuning.

    python benchmarks/step.py --model mid --method sft --rounds 5 --output step.json
    python benchmarks/step.py --model sdxl --method rlhf --mixed_precision bf16 --use_8bit_adam --decoder tiny

Runs the training script itself, on random weights and made-up data. After each of its steps, in the same process, the
same step is done by `benchmarks/naive.py` (all branches with graph, decodes in float32 with graph, backward through
the sampler, reference on all branches) and by a plain fine-tuning step of the same batch; and what a step of one
branch must cost is done once: a forward without gradient, a decode and a reward. Ratios are step by step.

Every branch has all of its m steps. The first step warms up, in the second FLOPs and operators are counted, in the
third memory: what a step adds to what is held before it, on a GPU by the allocator, on a CPU by counting tensors.

The literal reading is left out on a GPU unless asked for (`--naive`): with full SDXL its graph needs 82 to 200 GiB. A
rival that runs out of memory, in a step or when it is made, is reported and has no figures, and what it alone held is
let go; the script and the other rivals go on.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import OperatorCount, matmul_peak, peak_memory
from benchmarks.models import SIZES, write_pipeline
from benchmarks.reporting import describe_machine, spread
from benchmarks.rivals import PARTS, Rivals
from benchmarks.script import CLOCK, SCRIPTS, Setting, clocked, each_step, write_data
from sharpening.errors import exit_status, first_line
from sharpening.flags import Flag, parse

RIVALS = tuple(PARTS)
COUNTED, WEIGHED, TIMED = 1, 2, 3  # the steps in which FLOPs and memory are counted, and the first that is timed

STEP_FLAGS = (
    Flag("model", "its size", default="mid", choices=SIZES),
    Flag("resolution", "pixels; unset: 32 for tiny, else 512", int, range="[1, inf)"),
    Flag("batch", "prompts in a step", int, 1, "[1, inf)"),
    Flag("mixed_precision", "of the scripts", default="no", choices=("no", "fp16", "bf16")),
    Flag("decoder", "what decodes for the reward", default="vae", choices=("vae", "tiny")),
    Flag("score_batch_size", "of the scripts", int, 16, "[1, inf)"),
    Flag("decode_batch_size", "of the scripts", int, 4, "[1, inf)"),
    Flag("use_lora", "of the scripts", bool, False),
    Flag("gradient_checkpointing", "of the scripts", bool, False),
    Flag("use_8bit_adam", "of the scripts", bool, False),
    Flag("rounds", "steps that are timed", int, 5, "[1, inf)"),
)
METHOD_FLAGS = (
    Flag("method", "which script", default="sft", choices=tuple(sorted(SCRIPTS))),
    Flag("num_noisy_latents", "n, branches per prompt", int, 3, "[1, inf)"),
    Flag("trajectory_nums", "m, steps of each branch", int, 3, "[1, inf)"),
    Flag("latents_per_prompt", "of the RLHF script", default="n", choices=("1", "n")),
    Flag("naive", "measure the literal reading too; unset: on a CPU, and not on a GPU", bool),
    Flag("output", "write every figure here as JSON", Path),
)


class Measurement:
    """Figures of the script's steps and, after each of them, of the rivals' beside it.

    Attributes:
        result: "seconds" (name -> by round), "phases" of the script (by round), "flops", "operators" and "peak_bytes"
            of one step (by name), and "out_of_memory" (name -> the error): such a rival has no other figures.
    """

    def __init__(
        self,
        beside: dict[str, Callable[[], object]],
        keep: Callable[[Collection[str]], None] = lambda names: None,
    ) -> None:
        """`beside` are the rivals by name; `keep` is told which of them go on when one does not."""
        self.beside, self.keep = dict(beside), keep
        names = {name: [] for name in ("script", *beside)}
        self.result: dict[str, Any] = {
            "seconds": names, "phases": [], "flops": {}, "operators": {}, "peak_bytes": {}, "out_of_memory": {},
        }  # fmt: skip

    @contextmanager
    def visit(self, index: int) -> Iterator[None]:
        """Around the script's step number `index`, from 0: measures it, and then the rivals in the same way."""
        with self._measured(index, "script"):
            yield
        for name, work in list(self.beside.items()):
            problem = None
            try:
                with self._measured(index, name):
                    work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = first_line(error)
            if problem:  # outside of `except`, where the error keeps the rival's tensors alive
                self._leave_out(name, problem)

    def _leave_out(self, name: str, problem: str) -> None:
        """Go on without a rival, and without the figures that it has so far."""
        del self.beside[name]
        for figure in ("seconds", "flops", "operators", "peak_bytes"):
            self.result[figure].pop(name, None)
        self.result["out_of_memory"][name] = problem
        self.keep(self.beside)
        gc.collect()
        torch.cuda.empty_cache()

    @contextmanager
    def _measured(self, index: int, name: str) -> Iterator[None]:
        if index == COUNTED:
            # The inner one sees operators before the outer one takes some of them apart.
            with FlopCounterMode(display=False) as flops, OperatorCount() as operators:
                yield
            self.result["flops"][name] = flops.get_total_flops()
            self.result["operators"][name] = operators.total
        elif index == WEIGHED:
            with peak_memory() as peak:
                yield
            self.result["peak_bytes"][name] = peak.size
        else:
            CLOCK.start()
            yield
            phases = CLOCK.stop()
            if index >= TIMED:  # earlier ones warm up
                self.result["seconds"][name].append(sum(phases.values()))
                if name == "script":
                    self.result["phases"].append(phases)


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, a GPU (`torch.OutOfMemoryError`), a library of CUDA's or PyTorch on a CPU (both a RuntimeError)
    had no memory to give."""
    said = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in said)


def rivals_for(naive: bool | None, gpu: bool) -> tuple[str, ...]:
    """The rivals that `--naive` asks for; unset, the literal reading is measured where there is no GPU."""
    measured = not gpu if naive is None else naive
    return RIVALS if measured else tuple(name for name in RIVALS if name != "naive")


def measure(setting: Setting, folder: Path, beside: Sequence[str] = RIVALS) -> dict[str, Any]:
    """Seconds by round and phase of the script and of the rivals beside it, FLOPs, operators and peak memory.

    Raises:
        UserError: the script refuses the setting.
        RuntimeError: the script failed.
    """
    dtype = torch.float16 if setting.mixed_precision == "fp16" else torch.float32
    write_pipeline(setting.model, folder / "model", dtype)
    write_data(folder / "data", setting.resolution)
    command = setting.command(folder, TIMED + setting.rounds)
    setting.script.parse_args(command)
    rivals = Rivals(setting, folder / "model")
    measurement = Measurement({name: getattr(rivals, name) for name in beside}, rivals.keep)
    with each_step(measurement.visit), clocked():
        if setting.script.cli(command):
            raise RuntimeError("the training script failed; it says above why")
    result = measurement.result
    if measurement.beside:  # else there is no memory for a UNet beside the script's
        with FlopCounterMode(display=False) as flops:
            rivals.forward()
        rows = setting.batch * setting.num_noisy_latents * setting.trajectory_nums
        result["flops"]["score"] = rows * flops.get_total_flops()
    result["matmul_peak"] = matmul_peak(rivals.device, rivals.dtype)
    return result


def ratio(result: dict[str, Any], to: str) -> str:
    """The script's seconds as a share of a rival's, step by step: median and range."""
    shares = [ours / theirs for ours, theirs in zip(result["seconds"]["script"], result["seconds"][to], strict=True)]
    return spread(shares)


def report(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = []
    for name, seconds in result["seconds"].items():
        median, flops = statistics.median(seconds), result["flops"][name]
        lines.append(
            f"{name:>11}  {median:8.3f} s  {flops / 1e12:8.3f} TFLOP  {flops / median / 1e12:7.3f} TFLOP/s, "
            f"{flops / median / result['matmul_peak']:.0%} of the matrix product's  "
            f"peak {result['peak_bytes'][name] / 2**30:6.2f} GiB"
        )
    names = list(dict.fromkeys(name for phases in result["phases"] for name in phases))
    spent = {name: statistics.median(phases.get(name, 0.0) for phases in result["phases"]) for name in names}
    if "score" in spent and "score" in result["flops"]:
        rate = result["flops"]["score"] / spent["score"]
        share = rate / result["matmul_peak"]
        lines.append(f"      score  {rate / 1e12:.3f} TFLOP/s, {share:.0%} of the matrix product's")
    lines.append("     phases  " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in spent.items()))
    lines.append("  operators  " + ", ".join(f"{name} {count}" for name, count in result["operators"].items()))
    lines += [f"{name:>11}  ran out of memory: {error}" for name, error in result["out_of_memory"].items()]
    for rival in [name for name in ("naive", "plain") if name in result["seconds"]]:
        memory = result["peak_bytes"]["script"] / result["peak_bytes"][rival]
        lines.append(f"  against {rival}: {ratio(result, rival)} of its time, {memory:.2f}x of its peak")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure, print, write; returns the exit status."""
    args = parse(__doc__.splitlines()[0], {"script": STEP_FLAGS, "method": METHOD_FLAGS}, argv)
    setting = Setting.of(vars(args))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(setting, Path(folder), rivals_for(args.naive, torch.accelerator.is_available()))
    print(f"{describe_machine()}; {' '.join(argv)}")
    print(report(result))
    if args.output:
        settings = {name: str(value) for name, value in {**vars(args), "resolution": setting.resolution}.items()}
        args.output.write_text(json.dumps({"machine": describe_machine(), "settings": settings, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
