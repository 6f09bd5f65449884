"""What surrounds the loop of a training script: opening a run, agreeing over ranks, logging, saving, ending.

It knows no loss, no branch and no reward's value. A run that must end early raises `Stop` with its exit status.
"""

import copy
import math
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, NoReturn

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast, set_seed
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCard
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from sharpening import flags, sdxl, sharding
from sharpening.data.encoding_cache import CachedData, collate
from sharpening.draws import Draws, DrawSampler, timestep_probabilities
from sharpening.errors import Stop, require
from sharpening.progress import underway
from sharpening.rewards.calling import Reward, RewardError
from sharpening.running import checkpoints, launching, optimization, publishing, tracking
from sharpening.running.cost import Cost
from sharpening.running.models import Models
from sharpening.running.pictures import Pictures
from sharpening.running.plan import Plan
from sharpening.running.signals import StopSignal
from sharpening.running.validation import Drawing, Validation, averaged_weights, read_validation_prompts
from sharpening.running.watch import Watch
from sharpening.running.writing import WriteError, attempt
from sharpening.selection import Scores

logger = get_logger(__name__)

PROMPTS_OF_A_STEP = ("train_batch_size", "gradient_accumulation_steps")  # only their product matters
SECONDS_TO_RELEASE = 1.0  # for gloo's workers


class Run:
    """A training run under way.

    Attributes:
        accelerator, device: of this process.
        models: to load.
        start_step: how many optimizer steps an earlier launch has finished.
    """

    def __init__(self, plan: Plan) -> None:
        """Make the output folder, find the checkpoint to resume from, and settle the seed, the same on every rank.

        Raises:
            UserError: naming the flag and the remedy.
        """
        sdxl.hide_library_bars()
        self.plan, self.args, self.output_dir = plan, plan.args, plan.output_dir
        self.accelerator, self.device, self.is_main = plan.accelerator, plan.device, plan.is_main
        args = self.args
        self._checkpoint = checkpoints.prepare_output(self.accelerator, self.output_dir, args.resume_from_checkpoint)
        state = checkpoints.read_state(self._checkpoint)
        steps = self.accelerator.gather(torch.tensor([state.get("step", -1)], device=self.device))
        require(
            bool((steps == steps[0]).all()),
            f"--output_dir {self.output_dir} does not hold the same checkpoints for every process; give a folder that "
            "all machines share",
        )
        method = state.get("method", plan.method.name)
        require(
            method == plan.method.name,
            f"--resume_from_checkpoint {self._checkpoint} was written by {method}, but this script is "
            f"{plan.method.name}; continue it with its own script, or start a new run",
        )
        if state:
            if args.seed is None:
                args.seed = state["args"]["seed"]
            bound = {name for name, flag in flags.every_flag(plan.groups).items() if not flag.free}
            names = sorted((bound & state["args"].keys() & vars(args).keys()).difference(PROMPTS_OF_A_STEP))
            processes, prompts = "the number of processes", " times ".join(f"--{name}" for name in PROMPTS_OF_A_STEP)
            was, now = (math.prod(of[name] for name in PROMPTS_OF_A_STEP) for of in (state["args"], vars(args)))
            checkpoints.warn_of_changes(
                {f"--{name}": state["args"][name] for name in names} | {prompts: was, processes: state["world_size"]},
                {f"--{name}": getattr(args, name) for name in names} | {prompts: now, processes: plan.world_size},
            )
        if args.seed is None:
            args.seed = secrets.randbelow(2**31)
        args.seed = int(broadcast(torch.tensor([args.seed], device=self.device)))
        set_seed(args.seed)
        self.start_step, self.run_id = state.get("step", 0), state.get("run_id", secrets.token_hex(4))
        self._cost = Cost(state.get("cost", {}))
        self.models = Models(plan, self._cost.watch)
        logger.info(f"seed {args.seed}, starting after step {self.start_step}")

    # ------------------------------------------------------------------------------------------------- opening

    def start_trackers(self) -> None:
        """Start W&B and TensorBoard with the public arguments; a resumed run continues the same W&B run.

        Raises:
            UserError: a tracker cannot start.
        """
        config = {"method": self.plan.method.name, **flags.public(self.args, self.plan.groups)}
        tracking.start_trackers(self.accelerator, config, self.run_id, self.args.report_to)

    def make_optimizer(
        self, unet: UNet2DConditionModel, rounds: int = 1
    ) -> tuple[Optimizer, LRScheduler, EMAModel | None]:
        """AdamW of the weights that train, its learning rates, and with `--use_ema` the average of the weights.

        The learning rates take their course in each of the `rounds` that the run consists of.
        """
        args, parameters = self.args, sdxl.trainable_parameters(unet)
        rate = args.learning_rate
        if args.scale_lr:
            rate *= args.gradient_accumulation_steps * args.train_batch_size * self.plan.world_size
        optimizer = optimization.make_adam(
            parameters,
            eight_bit=args.use_8bit_adam,
            scaled=self.accelerator.scaler is not None,
            lr=rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            eps=args.adam_epsilon,
        )
        steps = math.ceil(self.plan.num_steps / rounds)
        lr_scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=steps
        )
        ema = optimization.make_ema(unet, parameters, args.ema_decay) if args.use_ema else None
        return optimizer, lr_scheduler, ema

    def prepare(
        self, unet: UNet2DConditionModel, optimizer: Optimizer, lr_scheduler: LRScheduler, ema: EMAModel | None,
        pending: list[dict[str, Any]] | None = None, shared: dict[str, Any] | None = None,
    ) -> tuple[nn.Module, Optimizer]:  # fmt: skip
        """The model and the optimizer as accelerate wraps them, at the state of the checkpoint that is resumed.

        pending and shared are what else a checkpoint keeps, for each process and for all of them, read back into that
        same list and dictionary.
        """
        self._first_rates = copy.deepcopy(lr_scheduler.state_dict())
        if self.args.fsdp:
            sharding.save_whole_states(optimizer)
            optimizer = self.accelerator.prepare_optimizer(optimizer)
            # What it calls a mode for evaluation has its autocast and no second exchange of gradients.
            model = self.accelerator.prepare_model(unet, device_placement=False, evaluation_mode=True)
        else:
            model, optimizer = self.accelerator.prepare(unet, optimizer)
        checkpoints.register_checkpointing(self.accelerator, unet, ema, lr_scheduler, pending, shared, self.plan.hosts)
        if self._checkpoint is not None:
            # A GPU that holds parts has no room for the optimizer's whole states; the host need not read all at once.
            options = {"map_location": "cpu", "load_kwargs": {"mmap": True}} if self.args.fsdp else {}
            self.accelerator.load_state(str(self._checkpoint), **options)
        return model, optimizer

    def validate_with(
        self, encoders: sdxl.TextEncoders, unconditional: sdxl.Unconditional, vae: AutoencoderKL, reward: Reward | None
    ) -> None:
        """Embed the validation prompts, so that the encoders can be freed; vae and reward will draw and judge them.

        Without validation prompts no reward is needed. The vae also draws the images of `log_branches`.
        """
        args = self.args
        drawing = Drawing(
            args.num_validation_images, args.resolution, args.validation_guidance_scale, args.score_batch_size,
            args.decode_batch_size, args.seed,
        )  # fmt: skip
        self._validation = Validation(self.validation_prompts, drawing, encoders, unconditional, self.same_forwards)
        self._vae, self._reward = vae, reward
        self._cost.reward = reward

    @cached_property
    def validation_prompts(self) -> list[str]:
        """What validation draws, if anything."""
        return read_validation_prompts(self.args.validation_prompt, self.args.validation_prompts_file)

    def cache_options(self, images: bool = False) -> dict[str, Any]:
        """How embeddings, and latents of images, are cached, as `sharpening.data.encoding_cache` takes it."""
        return {
            "key": self.models.identity(images), "seed": self.args.seed, "batch_size": self.args.decode_batch_size,
            "cache_dir": self.args.cache_dir, "dtype": self.plan.weight_dtype,
        }  # fmt: skip

    def batches(self, data: CachedData, reuse: int = 1) -> Iterator[dict[str, Any]]:
        """Collated batches of this process in the order of the draws: all prompts of an optimizer step, however it is
        accumulated. Each batch serves `reuse` steps.

        Draws are counted in batches: one serves the optimizer steps g * reuse + 1 to (g + 1) * reuse.
        """
        args = self.args
        first, last = self.start_step // reuse, math.ceil(self.plan.num_steps / reuse)
        sampler = DrawSampler(
            len(data), args.train_batch_size * args.gradient_accumulation_steps, self.accelerator.process_index,
            self.plan.world_size, args.seed, first, last,
        )  # fmt: skip
        workers = {"num_workers": args.dataloader_num_workers, "pin_memory": self.device.type == "cuda"}
        return iter(DataLoader(data, batch_sampler=sampler, collate_fn=collate, **workers))

    def draws(self) -> Draws:
        """What is random about every draw."""
        args = self.args
        probabilities = timestep_probabilities(
            self.plan.schedule.num_train_timesteps, args.timestep_bias_strategy, args.timestep_bias_multiplier,
            args.timestep_bias_portion, args.timestep_bias_begin, args.timestep_bias_end,
        )  # fmt: skip
        return Draws(args.seed, probabilities, args.noise_offset, args.proportion_empty_prompts)

    def restart(
        self, unet: UNet2DConditionModel, optimizer: Optimizer, lr_scheduler: LRScheduler, ema: EMAModel | None
    ) -> None:
        """Begin a round: from the averaged weights, with optimizer, learning rates and average as at the start."""
        if ema is not None:
            optimization.restart_average(ema, sdxl.trainable_parameters(unet))
        optimization.restart(optimizer.optimizer, lr_scheduler, self._first_rates)

    # --------------------------------------------------------------------------------------------------- steps

    def steps(self, unet: UNet2DConditionModel) -> Iterator[int]:
        """The numbers of the optimizer steps to take, each begun when it is asked for."""
        args, parameters = self.args, sdxl.trainable_parameters(unet)
        self._rows = args.train_batch_size * args.gradient_accumulation_steps * self.plan.world_size
        self._stop = StopSignal()
        self._log = tracking.StepLog(
            self.accelerator, self.output_dir / "metrics.jsonl", Watch(self._rows, parameters), parameters,
            self.start_step, self.plan.num_steps, args.branch_image_steps,
        )  # fmt: skip
        self._finished, self._last_metrics = self.start_step, {}
        here = self.output_dir / f"checkpoint-{self.start_step}"
        self._saved_step = self.start_step if self._checkpoint == here else None
        self.stop_if(self._log.failure)
        for step in range(self.start_step + 1, self.plan.num_steps + 1):
            self._started, self.phase_seconds = time.perf_counter(), {}
            yield step
        self._log.progress.close()

    @contextmanager
    def exchange(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around a forward with its backward, the phase "train": processes exchange gradients once per optimizer step,
        in its last one, but with `--fsdp` in each one, because none of them could keep a whole gradient."""
        with self.phase("train"), nullcontext() if last else self.accelerator.no_sync(model):
            yield

    def any_rank(self, value: int) -> int:
        """The largest `value` over all ranks, so that every rank takes the same turn."""
        return launching.any_rank(value, self.plan.hosts)

    @property
    def forgets_gradients(self) -> bool:
        """Whether gradients may go after a step; DDP's are views of its buckets, which must stay."""
        return self.plan.world_size == 1 or self.args.fsdp

    def same_forwards(self, count: int) -> int:
        """How many forwards all ranks make where this one needs `count`: with `--fsdp` as many as the rank that needs
        most, because each forward gathers weights from all of them."""
        return self.any_rank(count) if self.args.fsdp else count

    @contextmanager
    def together(self, step: int, generated: Tensor | None = None) -> Iterator[None]:
        """Around the phase "score", in which a reward may fail: then all ranks stop, with the state after the last
        finished step saved; also if generated latents, which nobody can judge, are not finite.

        They are looked at afterwards, when the device has done its work: before, it would be waited for.

        Raises:
            Stop: with status 1.
        """
        failure = ""
        try:
            with self.phase("score"):
                yield
        except RewardError as error:
            failure = f"step {step}: {error}"
        if generated is not None and not generated.isfinite().all():
            failure = (
                f"step {step}: the generated latents are not finite; use --mixed_precision=bf16, or a lower "
                "--learning_rate if earlier steps were well"
            )
        self.stop_if(failure, "the reward failed on another process")

    def stop_if(self, failure: str, elsewhere: str = "another process failed; its message says how") -> None:
        """Stop all ranks if any of them has failed, and says how, with the state after the last finished step saved.

        elsewhere: what the others say.

        Raises:
            Stop: with status 1.
        """
        if not self.any_rank(bool(failure)):
            return
        said = failure or elsewhere
        if self._saved_step != self._finished:
            self._save(self._finished, f"{said}; ")
        self._end_with(f"{said}; the run is saved in {self.output_dir / f'checkpoint-{self._finished}'}")

    def _end_with(self, error: str) -> NoReturn:
        tqdm.write(f"error: {error}", file=sys.stderr)  # not into the progress bar's line
        self.close()
        raise Stop(1)

    def stop_if_diverged(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stop all ranks, who must have the same metrics, if the loss or the gradient of a step is not finite.

        A GradScaler skips such a gradient and lowers its scale; without one it would spoil the weights for good.

        Raises:
            Stop: with status 1.
        """
        if not math.isfinite(metrics.get("loss", 0)):  # absent if nothing of the step could be judged
            remedy = "lower --learning_rate or use --mixed_precision=bf16"
            self.stop_if(f"step {step}: the loss is {metrics['loss']}; {remedy}")
        if self.accelerator.scaler is None and not math.isfinite(metrics["grad_norm"]):
            self.stop_if(f"step {step}: the gradient is not finite; lower --learning_rate")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within as that of a phase of the step, in `phase_seconds`."""
        started = time.perf_counter()
        yield
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + time.perf_counter() - started

    def speed(self, *phases: str) -> dict[str, float]:
        """Curves of time: prompts of all processes per second since the step began, and the share of some phases."""
        seconds = time.perf_counter() - self._started
        shares = {f"{name}_time_share": self.phase_seconds.get(name, 0.0) / seconds for name in phases}
        return {"samples_per_second": self._rows / seconds, **shares}

    def log_branches(
        self, step: int, prompts: Sequence[str], latents: Tensor, scores: Scores | None = None,
        t: Tensor | None = None, **rows: Tensor,
    ) -> None:  # fmt: skip
        """Log the images of some rows of latents (R, 4, h, w), such as the best branches, if it is time, each with its
        prompt, one of P, with what R scores say of it, and with the first timestep of its branch, t (P,)."""
        if self.is_main and step % self.args.branch_image_steps == 0:
            decode = partial(sdxl.decode_latents, self._vae, batch_size=self.args.decode_batch_size)
            of = partial(Pictures.branches, decode, latents, prompts=prompts, scores=scores, t=t)
            self._log.write_images(step, {f"branches/{name}": of(rows=which) for name, which in rows.items()})

    def end_step(self, step: int, metrics: dict[str, float], unet: UNet2DConditionModel, ema: EMAModel | None) -> None:
        """Validate if it is time, log, save if it is time, and end the run if a signal asks for it.

        Raises:
            Stop: with status 1 if the reward fails or the disk takes no more, with 128 + n by signal n.
        """
        self._finished = step
        if (scaler := self.accelerator.scaler) is not None:
            skipped = float(self.accelerator.optimizer_step_was_skipped)
            metrics |= {"scaler/scale": scaler.get_scale(), "scaler/skipped": skipped}
        failure = ""
        if self._validation_is_due(step):
            with self.phase("validation"), self._cost.left_out():
                failure = self._validate(step, metrics, unet, ema)
        seconds = time.perf_counter() - self._started
        metrics |= self._cost.end_step(seconds, self.phase_seconds, self.plan.hosts)
        self._log.write(step, metrics)
        self._last_metrics = metrics
        self.stop_if(failure or self._log.failure)
        number = self.any_rank(self._stop.number)
        if step % self.args.checkpointing_steps == 0 or number:
            self._save(step)
        if number:
            logger.info(f"interrupted after step {step}; continue with --resume_from_checkpoint latest")
            self.close()
            raise Stop(128 + number)

    def _validate(self, step: int, metrics: dict[str, float], unet: UNet2DConditionModel, ema: EMAModel | None) -> str:
        """Draw, judge and log the validation images, each rank its share; how it failed on this rank, if it did."""
        failure, schedule = "", self.plan.validation_schedule
        try:
            drawn = self._validation.draw(self.accelerator, unet, ema, self._vae, schedule, self._reward)
        except RewardError as error:
            failure = f"validation at step {step}: {error}"
        # Nothing is gathered unless every rank has its share.
        if self.any_rank(bool(failure)):
            return failure
        images, scores = self._validation.gather(self.accelerator, drawn)
        metrics.update(self._validation.metrics(scores))
        if self.is_main:
            shown = Pictures.judged(images, self._validation.prompts, scores)
            self._log.write_images(step, {"validation/images": shown})
        return failure

    def _validation_is_due(self, step: int) -> bool:
        """Whether step (from 1) ends a multiple of `--validation_steps` steps or of `--validation_epochs` epochs."""
        every = self.args.validation_steps, self.args.validation_epochs * self.plan.steps_per_epoch
        return bool(self._validation.prompts) and any(interval and step % interval == 0 for interval in every)

    def _save(self, step: int, before: str = "") -> None:
        """Save a checkpoint; if that cannot be done all ranks stop, and say what there is to say `before`.

        Raises:
            Stop: with status 1.
        """
        state = {"run_id": self.run_id, "method": self.plan.method.name, "world_size": self.plan.world_size}
        state |= {"args": flags.public(self.args, self.plan.groups), "cost": self._cost.total}
        keep = self.args.checkpoints_total_limit
        try:
            checkpoints.save_checkpoint(self.accelerator, self.output_dir, step, state, keep, self.plan.hosts)
        except WriteError as error:
            self._end_with(f"{before}{error}; {checkpoints.newest_whole(self.output_dir)}")
        self._saved_step = step

    # -------------------------------------------------------------------------------------------------- ending

    def finish(self, unet: UNet2DConditionModel, ema: EMAModel | None) -> None:
        """Write the result and its model card into `--output_dir`, where stock diffusers loads it; end the run.

        Raises:
            Stop: with status 1 if the result could not be written; the state after the last step is saved if it fits.
            UserError: it could not be pushed to the hub.
        """
        args = self.args
        with averaged_weights(unet, ema):
            whole = sharding.whole_unet(unet)
            failure = attempt("the result", lambda: self._write_result(whole)) if self.is_main else ""
        self.stop_if(failure)
        self.close()
        if self.is_main and args.push_to_hub:
            repository = args.hub_model_id or self.output_dir.name
            publishing.push_to_hub(self.output_dir, repository, args.hub_token, args.logging_dir)

    def _write_result(self, unet: UNet2DConditionModel) -> None:
        """What was trained, a whole pipeline or an adapter, written aside first, and the curve of rewards."""
        args = self.args
        with underway("saving the result"), publishing.result_aside(self.output_dir) as partial:
            if args.use_lora:
                sdxl.save_lora(unet, partial)
            else:
                vae = self._vae if args.pretrained_vae_model_name_or_path else None
                publishing.save_pipeline(self.plan.source, unet, vae, args.prediction_type, partial)
            self._model_card().save(partial / "README.md")
        saved, curve = "LoRA adapter" if args.use_lora else "pipeline", self.output_dir / "reward_curve.png"
        if tracking.plot_rewards(self._log.path, curve):
            saved += f" and {curve.name}"
        print(f"saved the {saved} to {self.output_dir}", flush=True)

    def _model_card(self) -> ModelCard:
        args = self.args
        method = self.plan.method
        facts = [f"{self._finished} optimizer steps with {method.linked()}", f"reward `{args.reward_model}`"]
        return publishing.model_card(
            args.hub_model_id or self.output_dir.name, args.pretrained_model_name_or_path,
            ", ".join([*facts, *self.plan.facts.values()]), method.tag, flags.public(args, self.plan.groups),
            self._last_metrics,
        )  # fmt: skip

    def close(self) -> None:
        """Close the progress bar, end trackers and the process group; every rank must call it.

        The group is destroyed under the interpreter's lock, which gloo's workers need once more to release the tensors
        of a gather: destroyed before, it hangs. Nothing tells that they have; asleep we hold no lock, and a worker
        that gets a core within that time is done.
        """
        self._log.progress.close()
        self.accelerator.wait_for_everyone()
        if self.plan.world_size > 1:
            time.sleep(SECONDS_TO_RELEASE)
        if failure := attempt("the trackers' files", self.accelerator.end_training):
            logger.warning(failure)
            self.accelerator.state.destroy_process_group()
