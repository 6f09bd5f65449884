"""A run as its flags describe it, before any model is loaded: the accelerator, the sources, the length, the cost.

Does not import diffusers' models, so that `--dry_run` answers soon.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sharpening import flags
from sharpening.model_source import Source
from sharpening.run_flags import check_schedule
from sharpening.running import launching
from sharpening.trajectory import Schedule

logger = logging.getLogger(__name__)

FEW_GENERATIONS = 10  # fewer gain less for the same compute (docs/study.md)


class Method(NamedTuple):
    """What a script does, for people and for the hub."""

    name: str
    tag: str  # of the model card
    paper: str  # arXiv id

    def linked(self) -> str:
        """The name with a link to the paper, in markdown."""
        return f"{self.name} ([arXiv {self.paper}](https://arxiv.org/abs/{self.paper}))"


class Plan:
    """What a training run will do.

    Attributes:
        args, groups: its flags, and their declarations.
        method: what is done.
        output_dir: of the run.
        accelerator, device, world_size, is_main: of this process.
        hosts: the group in which processes exchange what lies on the host; None: the default one.
        weight_dtype: of frozen models and cached embeddings.
        source: of the pipeline that is trained.
        schedule, validation_schedule: of its noise, in the sampling steps of training and of validation images.
        steps_per_epoch, num_steps: in optimizer steps, once `settle` was called.
        facts: what else there is to say of the method, by name, once `settle` was called.
    """

    def __init__(self, args: argparse.Namespace, groups: flags.Groups, method: Method) -> None:
        """Start the accelerator and read the scheduler.

        Raises:
            UserError: naming the flag and the remedy.
        """
        self.args, self.groups, self.method = args, groups, method
        sys.argv[:] = flags.redact(sys.argv, groups)  # trackers record it
        self.output_dir = Path(args.output_dir)
        self.accelerator = launching.make_accelerator(
            self.output_dir, args.logging_dir, args.mixed_precision, args.report_to, args.allow_tf32,
            launching.process_options(args.collective_timeout_minutes, args.initial_loss_scale),
        )  # fmt: skip
        self.device, self.world_size = self.accelerator.device, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.hosts = launching.group_of_hosts(args.collective_timeout_minutes)
        launching.warn_of_accumulation(args.gradient_accumulation_steps)
        self.weight_dtype = launching.weight_dtype(self.accelerator)
        self.source = Source(
            "pretrained_model_name_or_path", args.pretrained_model_name_or_path, args.revision, args.variant,
            args.cache_dir,
        )  # fmt: skip
        config = self.source.read_json("scheduler/scheduler_config.json")
        check_schedule(vars(args), config["num_train_timesteps"])
        self.schedule = Schedule.from_config(config, args.infer_steps, args.prediction_type)
        drawn_with = args.validation_infer_steps or args.infer_steps
        self.validation_schedule = Schedule.from_config(config, drawn_with, args.prediction_type)
        self.steps_per_epoch = self.num_steps = 0
        self.facts: dict[str, str] = {}

    def data_options(self) -> dict[str, Any]:
        """The flags that say which data, those that the script has, as the loaders of `sharpening.data` take them."""
        names = "dataset_name dataset_config_name train_data_dir caption_column max_train_samples cache_dir"
        given = {name: getattr(self.args, name) for name in names.split() if hasattr(self.args, name)}
        return {"seed": self.args.seed or 0, **given}

    def settle(
        self,
        rows: int,
        data: str,
        cost: Mapping[str, float],
        facts: Mapping[str, str],
        reuse: int = 1,
        frozen: bool = False,
    ) -> None:
        """Settle the length of the run and print what it will do.

        Args:
            rows: of the data, which `data` describes, e.g. "200 rows of NAME".
            cost: rows that one process puts through the UNet in an optimizer step, by purpose, and through the
                decoder by the purpose "decode".
            facts: what else there is to say of the method, by name.
            reuse: optimizer steps that one batch serves.
            frozen: a frozen copy of the UNet is held.
        """
        args, self.facts = self.args, dict(facts)
        batch = args.train_batch_size * args.gradient_accumulation_steps * self.world_size
        self.steps_per_epoch = math.ceil(rows / batch) * reuse
        self.num_steps = args.max_train_steps or args.num_train_epochs * self.steps_per_epoch
        if not self.is_main:
            return
        parameters = launching.count_unet_parameters(self.source, args.lora_rank if args.use_lora else None)
        half, generations = self.weight_dtype != torch.float32, math.ceil(self.num_steps / reuse)
        forwards = [f"{rows:g} rows to {purpose}" for purpose, rows in cost.items() if rows and purpose != "decode"]
        training = f", LoRA of rank {args.lora_rank}: {parameters[1] / 1e6:.1f}M train" if args.use_lora else ""
        lines = {
            "model": f"{self.source.name}, UNet of {parameters[0] / 1e6:.1f}M parameters{training}",
            "data": data,
            "reward": args.reward_model,
            **facts,
            "rows per step": f"{batch} = {args.train_batch_size} per batch x {args.gradient_accumulation_steps} "
            f"accumulated x {self.world_size} processes",
            "forwards per step": f"{', '.join(forwards)}, per process",
            "decodes per step": f"{cost['decode']:g}, per process",
            "steps": f"{self.num_steps}, {self.steps_per_epoch} per epoch, "
            f"{self.num_steps / self.steps_per_epoch:.2f} epochs",
            **({"generations": f"{generations} fresh ones, each for {reuse} steps"} if reuse > 1 else {}),
            "memory held": launching.memory_held(
                parameters, half, args.use_8bit_adam, args.use_ema, frozen, self.world_size if args.fsdp else 1
            ),
            "output": args.output_dir,
        }
        print(launching.as_plan(lines), flush=True)
        if reuse > 1 and generations < FEW_GENERATIONS:
            logger.warning(
                f"{generations} fresh generations are few: on the tiny world 6 gained a fifth less than 22 at the "
                "same compute (docs/study.md); lower --generation_reuse or raise --max_train_steps"
            )
