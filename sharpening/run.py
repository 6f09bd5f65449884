"""What a run needs around the loop: accelerator, trackers, optimizer, average, signals, ways to end."""

import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn import Parameter
from torch.optim import Optimizer
from tqdm.auto import tqdm

from sharpening.arguments import public, reward_flags
from sharpening.errors import UserError
from sharpening.running.checkpoints import save_checkpoint

logger = get_logger(__name__)

SECONDS_TO_RELEASE = 1.0  # for gloo's workers


def quiet_libraries() -> None:
    """No progress bars of the libraries that load models: the run has its own."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()


def start_trackers(accelerator: Accelerator, args: Namespace, run_id: str) -> None:
    """Start W&B and TensorBoard with the public arguments; a resumed run continues the same W&B run.

    Raises:
        UserError: a tracker cannot start.
    """
    config = {
        name: value if isinstance(value, (int, float, str)) else str(value) for name, value in public(args).items()
    }
    options = {"dir": str(accelerator.logging_dir), "id": run_id, "resume": "allow"}
    Path(accelerator.logging_dir).mkdir(parents=True, exist_ok=True)
    try:
        accelerator.init_trackers("diffusion-sharpening", config=config, init_kwargs={"wandb": options})
    except Exception as error:
        raise UserError(
            f"--report_to {args.report_to}: the tracker did not start ({type(error).__name__}: {error}); run "
            "`wandb login`, set WANDB_MODE=offline, or choose --report_to tensorboard"
        ) from error


def make_optimizer(parameters: list[Parameter], args: Namespace, world_size: int, scaled: bool = False) -> Optimizer:
    """AdamW, or its 8-bit version from bitsandbytes; `scaled`: a GradScaler decides which of its steps are taken.

    On a CPU and on CUDA AdamW is the fused one, which needs no memory beside its states. It would hide from accelerate
    which steps a GradScaler has skipped.
    """
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * world_size
    fused = not scaled and {parameter.device.type for parameter in parameters} <= {"cpu", "cuda"}
    optimizer_class: Callable[..., Optimizer] = partial(torch.optim.AdamW, fused=fused)
    if args.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except (ImportError, RuntimeError) as error:
            raise UserError(
                f"--use_8bit_adam needs bitsandbytes ({error}); install it or leave the flag out"
            ) from error
        optimizer_class = AdamW8bit
    return optimizer_class(
        parameters,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def make_ema(
    unet: UNet2DConditionModel, parameters: list[Parameter], args: Namespace, device: torch.device
) -> EMAModel:
    """An exponential moving average of the weights that train, warmed up from the first step on."""
    ema = EMAModel(parameters, decay=args.ema_decay, model_cls=UNet2DConditionModel, model_config=unet.config)
    ema.to(device)
    return ema


def reward_options(args: Namespace, world_size: int) -> dict[str, Any]:
    """The reward flags for one of `world_size` processes; a cap on calls is shared out among them.

    Raises:
        UserError: the cap is too small to share.
    """
    flags = reward_flags(args)
    if args.mllm_max_calls is not None:
        if args.mllm_max_calls < world_size:
            raise UserError(
                f"--mllm_max_calls is {args.mllm_max_calls}, but {world_size} processes share it; raise it"
            )
        flags["mllm_max_calls"] = args.mllm_max_calls // world_size
    return flags


class StopSignal:
    """Remembers the first SIGTERM or SIGINT so that the step under way can end; a second one acts at once."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)
        print(f"{signal.Signals(number).name}: ending this step, then saving a checkpoint", flush=True)


def any_rank(accelerator: Accelerator, value: int) -> int:
    """The largest `value` over all ranks, so that every rank takes the same turn."""
    if accelerator.num_processes == 1:
        return value
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def finish(accelerator: Accelerator) -> None:
    """End trackers and the process group; every rank must call it."""
    let_gloo_release(accelerator)
    accelerator.end_training()


def let_gloo_release(accelerator: Accelerator) -> None:
    """Wait for all ranks and then, where gloo connects them, for its workers.

    The group is destroyed under the interpreter's lock, which gloo's workers need once more to release the tensors of
    a gather: destroyed before, it hangs. Nothing tells that they have; asleep we hold no lock, and a worker that gets
    a core within that time is done.
    """
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1 and "gloo" in torch.distributed.get_backend():
        time.sleep(SECONDS_TO_RELEASE)


def fail(accelerator: Accelerator, args: Namespace, step: int, run_id: str, message: str) -> int:
    """Save the state after the last finished step, say what went wrong, and return exit status 1."""
    path = save_checkpoint(accelerator, args, step, run_id)
    tqdm.write(f"error: {message}; the run is saved in {path}", file=sys.stderr)  # not into the progress bar's line
    finish(accelerator)
    return 1


def interrupted(accelerator: Accelerator, step: int, number: int) -> int:
    """Say how to go on, and return the exit status that shells use for signal `number`."""
    logger.info(f"interrupted after step {step}; continue with --resume_from_checkpoint latest")
    finish(accelerator)
    return 128 + number
