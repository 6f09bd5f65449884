"""What an optimizer step asks of a GPU, counted without a GPU and without weights, and how long it might take.

    python benchmarks/simulate.py --method sft --resolution 512 --batch 4 --mixed_precision bf16 --output step.json
    python benchmarks/simulate.py --fit --batch 1 --mixed_precision bf16 --gradient_checkpointing --output fit.json

Runs the training script's own `main` on a device that is simulated (`benchmarks/simulated_gpu.py`). Nothing of the
script is replaced but the loading of models, which are made from their configs without values. The first step makes
what lasts, the second is counted. Every branch has all of its m steps; the reward is the mean brightness.

Seconds are an ESTIMATE, not a measurement: of each phase the larger of its launches one after another and of the sum,
over its operators, of the larger of arithmetic and memory traffic, at the rates and shares printed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from accelerate.state import AcceleratorState
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from benchmarks.models import SIZES, write_pipeline
from benchmarks.script import SCRIPTS, Setting, in_phases, write_data
from benchmarks.simulated_gpu import DEVICE, SimulatedGPU, Work
from sharpening.errors import exit_status
from sharpening.flags import Flag, parse
from sharpening.model_source import Source
from sharpening.run import Run
from sharpening.sdxl import trainable_parameters

PHASES = ("generation", "score", "decode", "reference", "train", "optimizer", "rest")
CARDS_GIB = (24, 40, 80)
BESIDE_GIB = 1.5  # what a GPU holds beside tensors: CUDA's context, workspaces, what the allocator cannot use
GIB, STEPS = 2**30, 2  # the last of the steps is counted


@dataclass(frozen=True)
class GPU:
    """A card as its data sheet has it, dense: FLOP/s in 16 bits and in float32 without TF32, bytes/s."""

    low_precision: float
    float32: float
    bandwidth: float


GPUS = {
    "RTX 4090": GPU(165e12, 82.6e12, 1.008e12),
    "A100": GPU(312e12, 19.5e12, 2.039e12),  # 80 GB, SXM
    "H100": GPU(989e12, 66.9e12, 3.35e12),  # SXM
}
LAUNCH_SECONDS = 8e-6  # of an operator of eager PyTorch, on the host
SHARE_OF_PEAK, SHARE_OF_BANDWIDTH = 0.6, 0.8  # what large operators attain

STAND_INS = (
    "tensors on the GPU have no values; what is read from it is made up, masks on it are taken as all True",
    "models are made from their configs, without weights; text encoders of two layers encode before the loop",
    "CUDA's autocast is torch's own; the attention kernel is chosen here: flash in 16 bits, else memory-efficient",
    "the reward is the mean brightness; its scores are random",
    "a launch is an operator that is no view, however many kernels it starts; a fused or foreach operator is one",
    "memory is that of tensors: without CUDA's context, workspaces inside kernels and fragmentation",
)

STEP_FLAGS = (
    Flag("model", "its size", default="sdxl", choices=SIZES),
    Flag("resolution", "pixels; unset: 32 for tiny, else 512", int, range="[1, inf)"),
    Flag("batch", "prompts, times --gradient_accumulation_steps", int, 1, "[1, inf)"),
    Flag("gradient_accumulation_steps", "as many times --batch prompts make a step", int, 1, "[1, inf)"),
    Flag("mixed_precision", "of the scripts", default="bf16", choices=("no", "fp16", "bf16")),
    Flag("decoder", "what decodes for the reward", default="vae", choices=("vae", "tiny")),
    Flag("generation_batch_size", "of the RLHF script", int, 16, "[1, inf)"),
    Flag("score_batch_size", "of the scripts", int, 16, "[1, inf)"),
    Flag("decode_batch_size", "of the scripts", int, 4, "[1, inf)"),
    Flag("use_lora", "of the scripts", bool, False),
    Flag("gradient_checkpointing", "of the scripts", bool, False),
)
METHOD_FLAGS = (
    Flag("method", "which script", default="sft", choices=tuple(sorted(SCRIPTS))),
    Flag("num_noisy_latents", "n, branches per prompt", int, 3, "[1, inf)"),
    Flag("trajectory_nums", "m, steps of each branch", int, 3, "[1, inf)"),
    Flag("latents_per_prompt", "of the RLHF script", default="1", choices=("1", "n")),
    Flag("fit", f"both methods, full and LoRA, 512 and 1024 px, against cards of {CARDS_GIB} GiB", bool, False),
    Flag("output", "write every figure here as JSON", Path),
)


class _Counted(Exception):
    """The step to count is over."""


def write_configs(model: str, folder: Path) -> None:
    """Save a pipeline of a size in `SIZES` and its small decoder as `write_pipeline` does, without weights."""
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        for owner in (ModelMixin, PreTrainedModel):
            stack.enter_context(patch.object(owner, "save_pretrained", _save_config))
        write_pipeline(model, folder, torch.float32)


def _save_config(model: nn.Module, folder: Path, **options: Any) -> None:
    save = model.save_config if isinstance(model, ModelMixin) else model.config.save_pretrained
    save(folder)


def _load(source: Source, model_class: type, subfolder: str | None = None, **options: Any) -> Any:
    """`Source.load`, the weights of a model made on the device instead of read."""
    if not issubclass(model_class, nn.Module):
        return load_of_source(source, model_class, subfolder, **options)
    config = source.read_json(f"{subfolder}/config.json" if subfolder else "config.json")
    with torch.device(DEVICE), torch.no_grad():
        if issubclass(model_class, ModelMixin):
            model = model_class.from_config(config)
        else:
            model = model_class(model_class.config_class.from_dict(config))
        return model.to(options.get("dtype", torch.float32)).eval()


load_of_source = Source.load


@contextmanager
def _phases(gpu: SimulatedGPU) -> Iterator[None]:
    """Within, work is counted by the phases of the scripts, that of the last step alone, after which they end."""
    steps_of_run = Run.steps

    def steps(run: Run, unet: nn.Module) -> Iterator[int]:
        gpu.adopt(trainable_parameters(unet))
        for index, step in enumerate(steps_of_run(run, unet), 1):
            if index == STEPS:
                gpu.start()
            yield step
            if index == STEPS:
                run.close()
                raise _Counted

    with in_phases(gpu.during), patch.object(Run, "steps", steps):
        yield


def simulate(setting: Setting, *more: str) -> SimulatedGPU:
    """The device after one optimizer step of the script; `more` are further flags of it.

    Raises:
        UserError: the script refuses the setting.
    """
    gpu = SimulatedGPU()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_configs(setting.model, folder / "model")
        write_data(folder / "data", setting.resolution)
        with patch.object(torch.cuda, "is_available", lambda: True):  # a flag may need a GPU
            args = setting.script.parse_args([*setting.command(folder, STEPS + 1), *more])
        with patch.object(Source, "load", _load), _phases(gpu):
            try:
                with gpu:
                    setting.script.main(args)
            except _Counted:
                pass
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)
    return gpu


def busy_seconds(work: Counter[Work], gpu: GPU) -> float:
    """Seconds that a GPU needs for the work, if the host is never late."""

    def seconds(one: Work) -> float:
        peak = gpu.low_precision if one.low_precision else gpu.float32
        return max(one.flops / peak / SHARE_OF_PEAK, one.moved / gpu.bandwidth / SHARE_OF_BANDWIDTH)

    return sum(count * seconds(one) for one, count in work.items())


def figures(work: Counter[Work]) -> dict[str, float]:
    """Launches, casts, GB and TFLOP of some work."""
    casts = {one: count for one, count in work.items() if one.cast}
    return {
        "launches": work.total(),
        "casts": sum(casts.values()),
        "cast_gb": sum(one.moved * count for one, count in casts.items()) / 1e9,
        "moved_gb": sum(one.moved * count for one, count in work.items()) / 1e9,
        "tflop": sum(one.flops * count for one, count in work.items()) / 1e12,
    }


def summary(gpu: SimulatedGPU) -> dict[str, Any]:
    """All figures of the counted step: the whole, "phases", and the "estimate" in seconds by card and phase."""
    names = [*PHASES, *sorted({one.phase for one in gpu.work} - {*PHASES})]
    by_phase = {name: Counter({one: n for one, n in gpu.work.items() if one.phase == name}) for name in names}
    phases = {
        name: figures(work) | {"peak_gib": gpu.peaks.get(name, 0) / GIB, "waits": gpu.waits[name]}
        for name, work in by_phase.items()
        if work
    }
    estimate: dict[str, Any] = {}
    for name, card in GPUS.items():
        bound = {
            phase: {"launching": by_phase[phase].total() * LAUNCH_SECONDS, "busy": busy_seconds(by_phase[phase], card)}
            for phase in phases
        }
        total = sum(max(seconds.values()) for seconds in bound.values())
        estimate[name] = {"seconds": total, "phases": bound, "assumed": asdict(card)}
    assumed = {
        "is": "an estimate, not a measurement: per phase max(launching, busy), busy the sum over operators of "
        "max(flop / peak, bytes / bandwidth)",
        "launch_seconds": LAUNCH_SECONDS, "share_of_peak": SHARE_OF_PEAK, "share_of_bandwidth": SHARE_OF_BANDWIDTH,
    }  # fmt: skip
    return {
        **figures(gpu.work), "peak_gib": max(gpu.peaks.values()) / GIB, "held_gib": gpu.held / GIB,
        "waits": gpu.waits.total(), "transfers": gpu.transfers.total(), "phases": phases,
        "estimate": estimate, "assumptions": assumed, "stand_ins": STAND_INS,
    }  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The figures as text."""
    columns = ("launches", "casts", "cast_gb", "moved_gb", "tflop", "peak_gib", "waits")
    lines = ["".join(f"{name:>12}" for name in ("phase", *columns, *(f"{card}, s" for card in GPUS)))]
    for name, phase in {**result["phases"], "all": result}.items():
        cells = [f"{phase[column]:12,.{0 if isinstance(phase[column], int) else 2}f}" for column in columns]
        for card in result["estimate"].values():
            seconds = card["seconds"] if name == "all" else max(card["phases"][name].values())
            cells.append(f"{seconds:12.3f}")
        lines.append(f"{name:>12}{''.join(cells)}")
    lines.append(f"held between steps: {result['held_gib']:.2f} GiB of tensors")
    lines.append(f"The seconds are {result['assumptions']['is']}.")
    lines.append(
        f"Assumed: {LAUNCH_SECONDS * 1e6:g} us a launch, {SHARE_OF_PEAK:.0%} of the peak and {SHARE_OF_BANDWIDTH:.0%} "
        "of the bandwidth; "
        + "; ".join(
            f"{name} {gpu.low_precision / 1e12:g} TFLOP/s in 16 bits, {gpu.float32 / 1e12:g} in float32, "
            f"{gpu.bandwidth / 1e12:g} TB/s"
            for name, gpu in GPUS.items()
        )
    )
    return "\n".join([*lines, *(f"- {stand_in}" for stand_in in STAND_INS)])


def fit(flags: dict[str, Any]) -> list[dict[str, Any]]:
    """Peak and what it fits into, of both methods, full and LoRA, at 512 and 1024 px; the other flags as they are."""
    rows = []
    for method in ("sft", "rlhf"):
        for use_lora in (False, True):
            for resolution in (512, 1024):
                change = {"method": method, "use_lora": use_lora, "resolution": resolution}
                result = simulated({**flags, **change})
                needed = result["peak_gib"] + BESIDE_GIB
                rows.append({**change, **result, "fits": {f"{card} GB": needed <= card for card in CARDS_GIB}})
                print(fit_row(rows[-1]), flush=True)
    return rows


def fit_row(row: dict[str, Any]) -> str:
    """A line of the table of `--fit`."""
    kind = "LoRA" if row["use_lora"] else "full"
    fits = " | ".join("yes" if fits else "no" for fits in row["fits"].values())
    peak = max(row["phases"], key=lambda name: row["phases"][name]["peak_gib"])
    return (
        f"| {row['method'].upper()}, {kind}, {row['resolution']} px | {row['held_gib']:.1f} | {row['peak_gib']:.1f} | "
        f"{peak} | {fits} |"
    )


def simulated(flags: dict[str, Any]) -> dict[str, Any]:
    """The figures of one step of the script with these flags."""
    setting = Setting.of({"use_8bit_adam": False, "rounds": 0, **flags})
    more = [f"--gradient_accumulation_steps={flags['gradient_accumulation_steps']}"]
    if setting.method == "rlhf":
        more.append(f"--generation_batch_size={flags['generation_batch_size']}")
    return summary(simulate(setting, *more))


def main(argv: list[str]) -> int:
    """Simulate, print, write; returns the exit status."""
    args = parse(__doc__.splitlines()[0], {"script": STEP_FLAGS, "method": METHOD_FLAGS}, argv)
    flags = vars(args)
    # Said of every model that is made, and of a GPU that is missing.
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "'pin_memory'")
    settings = {name: str(value) for name, value in flags.items()}
    if args.fit:
        print(f"| | held | peak | in | {' | '.join(f'{card} GB' for card in CARDS_GIB)} |", flush=True)
        result = {"fit": fit(flags), "beside_gib": BESIDE_GIB}
    else:
        result = simulated(flags)
        print(" ".join(argv))
        print(report(result))
    if args.output:
        args.output.write_text(json.dumps({"settings": settings, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
