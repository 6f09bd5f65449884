"""Checkpoints that a kill at any moment cannot spoil, and from which a run resumes exactly."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.distributed import ProcessGroup
from torch.optim.lr_scheduler import LRScheduler

from sharpening import sharding
from sharpening.errors import UserError
from sharpening.files import heed_umask
from sharpening.progress import underway
from sharpening.running.validation import averaged_weights
from sharpening.running.writing import WriteError, all_wrote, attempt
from sharpening.sdxl import load_lora, save_lora

logger = get_logger(__name__)

STATE_FILE = "state.json"  # written last: a checkpoint without it is incomplete
PENDING_FILE = "pending_{}.pt"  # one for each process
SHARED_FILE = "shared.pt"
EMA_STATE_FILE = "ema.pt"  # beside the averaged adapter: the average itself and its count of steps


def checkpoint_step(path: Path) -> int | None:
    """The optimizer step of a complete checkpoint folder, or None when it is not one."""
    try:
        return int(json.loads((path / STATE_FILE).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; incomplete ones are passed over with a warning."""
    complete = []
    for path in output_dir.glob("checkpoint-*"):
        if not re.fullmatch(r"checkpoint-\d+", path.name):
            continue
        if checkpoint_step(path) is None:
            logger.warning(f"{path} is incomplete (no {STATE_FILE}) and is passed over", main_process_only=True)
        else:
            complete.append(path)
    return sorted(complete, key=lambda path: int(path.name.split("-")[1]))


def clean_up_checkpoints(output_dir: Path) -> None:
    """Finish what a killed run left: drop half-written folders, put back one that was being replaced."""
    for path in output_dir.glob(".checkpoint-*"):
        original = output_dir / path.name.removeprefix(".").rsplit(".", 1)[0]
        if path.suffix == ".replaced" and not original.exists():
            path.rename(original)
        else:
            shutil.rmtree(path)


def prepare_output(accelerator: Accelerator, output_dir: Path, resume: str | None) -> Path | None:
    """Make the output folder, mend what a killed run left in it, and find the checkpoint to resume from.

    resume: "latest", the path of a checkpoint, or None for a new run.

    Raises:
        UserError: the folder cannot be written, the named checkpoint is incomplete, or a fresh run would mix its
            checkpoints with another's.
    """
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            try:
                output_dir.mkdir(parents=True, exist_ok=True)
                clean_up_checkpoints(output_dir)
            except OSError as error:
                raise UserError(f"--output_dir {output_dir} cannot be written ({error}); choose another") from error
    if resume not in (None, "latest"):
        path = Path(resume)
        if checkpoint_step(path) is None:
            raise UserError(
                f"--resume_from_checkpoint {path} is not a complete checkpoint (no {STATE_FILE}); name another, or "
                "latest"
            )
        return path
    found = complete_checkpoints(output_dir)
    if resume is None and found:
        raise UserError(
            f"--output_dir {output_dir} already holds {found[-1].name}; continue that run with "
            "--resume_from_checkpoint latest, or choose another folder"
        )
    if resume == "latest" and not found:
        logger.warning(f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint, so this run is new")
    return found[-1] if found else None


def read_state(checkpoint: Path | None) -> dict[str, Any]:
    """What `save_checkpoint` was told of the run, or nothing without a checkpoint."""
    return {} if checkpoint is None else json.loads((checkpoint / STATE_FILE).read_text())


def warn_of_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn of every setting, by its name for people, that is no longer what it was."""
    for name in now:
        if then[name] != now[name]:
            logger.warning(
                f"{name} was {then[name]} and is now {now[name]}: the resumed run differs from one that was never "
                "interrupted"
            )


def register_checkpointing(
    accelerator: Accelerator,
    unet: UNet2DConditionModel,
    ema: EMAModel | None,
    lr_scheduler: LRScheduler,
    pending: list[dict[str, Any]] | None = None,
    shared: dict[str, Any] | None = None,
    hosts: ProcessGroup | None = None,
) -> None:
    """Make `save_state` and `load_state` cover the schedule, and the UNet and its average as diffusers folders.

    With an adapter (`--use_lora`) the adapter stands for the UNet: `lora` and `lora_ema` are what
    `pipe.load_lora_weights` reads. `pending` is what each process on its own still has to use, made by weights that
    are gone, such as latents (`--generation_reuse`); `shared` is what all of them have alike, such as a reference
    (`--rounds`). They are read back into that same list and dictionary, on the CPU.

    What lies in parts on several processes is gathered before the main one writes anything, and all know by `hosts`,
    as of `launching.any_rank`, whether that went well before they gather what accelerate saves.
    """
    lora = hasattr(unet, "peft_config")

    def save(models: list[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        weights.clear()  # accelerate would otherwise write a second copy of them
        whole = sharding.whole_unet(unet)
        average = None if ema is None or lora else sharding.whole_average(ema)
        common = {name: sharding.whole_list(value) for name, value in (shared or {}).items()}
        what = f"step {_step_of(output_dir)}: the checkpoint"
        all_wrote(attempt(what, lambda: write(whole, average, common, output_dir)), hosts)

    def write(whole: UNet2DConditionModel, average: EMAModel | None, common: dict[str, Any], output_dir: str) -> None:
        if pending:
            torch.save(pending, os.path.join(output_dir, PENDING_FILE.format(accelerator.process_index)))
        if not accelerator.is_main_process:
            return
        if common:
            torch.save(common, os.path.join(output_dir, SHARED_FILE))
        if not lora:
            whole.save_pretrained(os.path.join(output_dir, "unet"))
            if average is not None:
                average.save_pretrained(os.path.join(output_dir, "unet_ema"))
            return
        save_lora(unet, os.path.join(output_dir, "lora"))
        if ema is not None:
            with averaged_weights(unet, ema):
                save_lora(unet, os.path.join(output_dir, "lora_ema"))
            torch.save(ema.state_dict(), os.path.join(output_dir, "lora_ema", EMA_STATE_FILE))

    def load(models: list[torch.nn.Module], input_dir: str) -> None:
        models.clear()
        file = os.path.join(input_dir, PENDING_FILE.format(accelerator.process_index))
        if pending is not None and os.path.exists(file):
            pending[:] = torch.load(file, map_location="cpu", weights_only=True)
        file = os.path.join(input_dir, SHARED_FILE)
        if shared is not None and os.path.exists(file):
            shared.update(torch.load(file, map_location="cpu", weights_only=True))
        if not os.path.isdir(os.path.join(input_dir, "lora" if lora else "unet")):
            written, remedy = ("without", "leave the flag out") if lora else ("with", "add the flag")
            raise UserError(f"--use_lora: {input_dir} was written {written} it; {remedy}, or start a new run")
        if lora:
            load_lora(unet, os.path.join(input_dir, "lora"))
        else:
            saved = UNet2DConditionModel.from_pretrained(input_dir, subfolder="unet", dtype=torch.float32)
            sharding.load_whole(unet, saved)
        if ema is None:
            return
        folder = os.path.join(input_dir, "lora_ema" if lora else "unet_ema")
        if not os.path.isdir(folder):
            raise UserError(f"--use_ema: {input_dir} was written without it; leave the flag out, or start a new run")
        if lora:
            state = torch.load(os.path.join(folder, EMA_STATE_FILE), map_location="cpu", weights_only=True)
            ema.load_state_dict(state)
        else:
            state = EMAModel.from_pretrained(folder, UNet2DConditionModel).state_dict()
            state["shadow_params"] = [*map(sharding.part, state["shadow_params"], ema.shadow_params)]
            ema.load_state_dict(state)
        ema.to(accelerator.device)

    accelerator.register_for_checkpointing(lr_scheduler)
    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, state: Mapping[str, Any], keep: int | None,
    hosts: ProcessGroup | None = None,
) -> Path:  # fmt: skip
    """Write `checkpoint-<step>` aside, rename it into place, then delete all but the newest `keep`.

    Every rank must call it; they agree by `hosts`, see `launching.any_rank`. A kill at any moment leaves either the
    old or the new set of complete checkpoints, and so does a disk that takes no more.

    Raises:
        WriteError: on every rank, if one of them cannot write; what was half-written is gone.
    """
    final = output_dir / f"checkpoint-{step}"
    partial = final.with_name(f".{final.name}.partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def complete() -> None:
        heed_umask(partial)
        (partial / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=2))
        _replace(final, partial)
        for old in complete_checkpoints(output_dir)[:-keep] if keep else []:
            # Out of sight first, so that a kill while deleting cannot leave something that looks complete.
            aside = old.with_name(f".{old.name}.deleted")
            old.rename(aside)
            shutil.rmtree(aside)

    what, is_main = f"step {step}: the checkpoint", accelerator.is_main_process
    try:
        with underway(f"saving {final.name}"):
            all_wrote(attempt(what, begin) if is_main else "", hosts)
            # On other machines this shows whether they share the folder, before any of them waits for another's part.
            all_wrote(attempt(what, lambda: partial.mkdir(exist_ok=True)), hosts)
            all_wrote(attempt(what, lambda: accelerator.save_state(str(partial))), hosts)
            all_wrote(attempt(what, complete) if is_main else "", hosts)
    except WriteError:
        if is_main:
            with suppress(OSError):
                clean_up_checkpoints(output_dir)
        raise
    if is_main:
        logger.info(f"saved {final}")
    return final


def _step_of(partial: str) -> str:
    """The step of a checkpoint that is being written, by its folder."""
    return Path(partial).name.split("-")[1].split(".")[0]


def _replace(final: Path, partial: Path) -> None:
    """Put a finished folder in place of one that may be there."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def newest_whole(output_dir: Path) -> str:
    """What a run can be continued from, in words."""
    found = complete_checkpoints(output_dir)
    return f"{found[-1]} is whole" if found else "no checkpoint is whole yet, so that begins anew"
