"""The training scripts as they are measured: random weights, made-up data, the command line, and what to count.

Nothing of a script is replaced. Methods of public classes that the scripts call are wrapped, to count their time and
to act between two steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from benchmarks.measuring import Clock
from benchmarks.models import TINY_DECODER
from sharpening.reference import Reference
from sharpening.run import Run

SCRIPTS = {"sft": "train_sft_diffusion_sharpening_sdxl", "rlhf": "train_rlhf_diffusion_sharpening_sdxl"}
INFER_STEPS = 25
BETA = 2500.0
LEARNING_RATE = 1e-6
PHASES = {"generation": "generate"}  # the scripts' names that read differently here

CLOCK = Clock()  # one for the process: a script loads the reward, which must find it, by its name


@dataclass(frozen=True)
class Setting:
    """What is measured: a script (`method`), a size of model, and the flags that both have."""

    method: str
    model: str
    resolution: int
    batch: int
    num_noisy_latents: int
    trajectory_nums: int
    latents_per_prompt: str
    mixed_precision: str
    decoder: str
    score_batch_size: int
    decode_batch_size: int
    use_lora: bool
    gradient_checkpointing: bool
    use_8bit_adam: bool
    rounds: int

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> Setting:
        """The setting of the flags by name, some of which are of other things; an unset resolution is 32 or 512."""
        values = {field.name: flags[field.name] for field in fields(cls)}
        values["resolution"] = values["resolution"] or (32 if values["model"] == "tiny" else 512)
        return cls(**values)

    @property
    def first_timestep(self) -> int:
        """The lowest timestep from which a branch has all of its steps."""
        return (self.trajectory_nums - 1) * (1000 // INFER_STEPS)

    @property
    def script(self) -> ModuleType:
        """The training script."""
        return import_module(SCRIPTS[self.method])

    def command(self, folder: Path, steps: int) -> list[str]:
        """The command line of the script for so many steps; `folder` holds the model, the data and the run."""
        flags = {
            "pretrained_model_name_or_path": folder / "model", "train_data_dir": folder / "data",
            "cache_dir": folder / "cache", "output_dir": folder / "run", "resolution": self.resolution,
            "train_batch_size": self.batch, "num_noisy_latents": self.num_noisy_latents,
            "trajectory_nums": self.trajectory_nums, "infer_steps": INFER_STEPS, "max_train_steps": steps,
            "reward_model": "benchmarks.script:clocked_brightness", "mixed_precision": self.mixed_precision,
            "timestep_bias_strategy": "range", "timestep_bias_begin": self.first_timestep, "timestep_bias_end": 1000,
            "timestep_bias_multiplier": 1e12, "report_to": "none", "validation_epochs": 0, "seed": 0,
            "score_batch_size": self.score_batch_size, "decode_batch_size": self.decode_batch_size,
            "checkpointing_steps": 1_000_000, "branch_image_steps": 1_000_000, "learning_rate": LEARNING_RATE,
        }  # fmt: skip
        if self.decoder == "tiny":
            flags["reward_vae"] = folder / "model" / TINY_DECODER
        if self.method == "rlhf":
            flags |= {"guidance_scale": 1, "latents_per_prompt": self.latents_per_prompt, "beta_dpo": BETA}
            flags["generation_batch_size"] = self.score_batch_size
        switches = [name for name in ("use_lora", "gradient_checkpointing", "use_8bit_adam") if getattr(self, name)]
        return [*(f"--{name}={value}" for name, value in flags.items()), *(f"--{name}" for name in switches)]


def brightness(images: Tensor) -> Tensor:
    """A reward that costs nothing: mean brightness, (B,)."""
    return images.mean((1, 2, 3))


def clocked_brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """The reward of the measured scripts: its time is the phase "reward" of `CLOCK`."""
    with CLOCK.phase("reward"):
        return brightness(images)


def write_data(folder: Path, resolution: int, count: int = 8) -> None:
    """A few noisy pictures with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "text": f"picture number {index}"} for index in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@contextmanager
def in_phases(during: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
    """Within, the phases of the scripts, and in them the reference, decoding and the optimizer, run inside
    `during(name)`."""
    phase_of_run, unet_of_reference = Run.phase, Reference.unet

    @contextmanager
    def phase(run: Run, name: str) -> Iterator[None]:
        with during(name), phase_of_run(run, name):
            yield

    @contextmanager
    def reference(self: Reference) -> Iterator[UNet2DConditionModel]:
        with during("reference"), unet_of_reference(self) as unet:
            yield unet

    def within(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with during(name):
                return function(*args, **kwargs)

        return wrapped

    with ExitStack() as stack:
        stack.enter_context(patch.object(Run, "phase", phase))
        stack.enter_context(patch.object(Reference, "unet", reference))
        for owner, method, name in (
            (AutoencoderKL, "decode", "decode"),
            (AutoencoderTiny, "decode", "decode"),
            (Accelerator, "clip_grad_norm_", "optimizer"),
            (AcceleratedOptimizer, "step", "optimizer"),
        ):
            stack.enter_context(patch.object(owner, method, within(getattr(owner, method), name)))
        yield


def clocked() -> AbstractContextManager[None]:
    """Within, `CLOCK` counts the phases of the scripts."""
    return in_phases(lambda name: CLOCK.phase(PHASES.get(name, name)))


@contextmanager
def each_step(visit: Callable[[int], AbstractContextManager[None]]) -> Iterator[None]:
    """Within, a script takes its optimizer step number `index`, from 0, inside `visit(index)`."""
    steps_of_run = Run.steps

    def steps(run: Run, unet: torch.nn.Module) -> Iterator[int]:
        for index, step in enumerate(steps_of_run(run, unet)):
            with visit(index):
                yield step

    with patch.object(Run, "steps", steps):
        yield
