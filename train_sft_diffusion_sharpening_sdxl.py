"""SFT Diffusion-Sharpening of SDXL (Tian et al., arXiv 2502.12146, algorithm 1).

For every image-text pair:
    SAMPLE  n noises and one timestep t; noise the image's latent n ways.
    SCORE   walk m sampling steps from each of the n branches without gradient; reward the clean estimate of each step.
    SELECT  the branch with the largest summed reward (eq. 8), prompt by prompt.
    TRAIN   walk the selected branch again and regress every step to that branch's noise (eq. 9).
States along a branch are data, so each step of TRAIN is backpropagated on its own: the gradient is that of the whole
loss, and peak memory grows neither with n nor with m. n = m = 1 is standard fine-tuning.

    accelerate launch train_sft_diffusion_sharpening_sdxl.py --pretrained_model_name_or_path=MODEL \
        --dataset_name=DATA --reward_model=clip --resolution=512 --train_batch_size=1 --mixed_precision=fp16
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from sharpening.arguments import parse, shared_parser, validate_schedule
from sharpening.errors import exit_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from sharpening.trajectory import Guide, Predict, Schedule


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The resolved flags of a run.

    Raises:
        UserError: naming the flag and the remedy.
    """
    parser = shared_parser(__doc__.splitlines()[0])
    parser.set_defaults(method="SFT")
    return parse(parser, argv)


def rows_per_step(args: argparse.Namespace) -> dict[str, int]:
    """Rows that one process puts through the UNet in an optimizer step, by purpose, and through the decoder.

    With P prompts, n branches of m steps, and 2 rows where a branch is guided: P n m to score, P m to train. Branches
    that end early, below t = 0, cost less.
    """
    prompts = args.train_batch_size * args.gradient_accumulation_steps
    guided = 1 if args.branch_guidance_scale == 1 else 2
    steps = prompts * args.trajectory_nums
    return {
        "score": steps * args.num_noisy_latents * guided,
        "train": steps * guided,
        "decode": steps * args.num_noisy_latents,
    }


def sft_losses(
    args: argparse.Namespace,
    predict: Predict,
    guide: Guide | None,
    schedule: Schedule,
    x_t: Tensor,
    t: Tensor,
    x_0: Tensor,
    eps: Tensor,
    active: Tensor,
) -> Iterator[Tensor]:
    """Equation 9 step by step: yields m scalars whose sum is the loss over the chosen branches.

    `loss = mean over prompts, then over a branch's active steps, of |eps_theta(x_k, c, t_k) - eps|^2`. The weight of
    a step depends on no model output, so each scalar can be backpropagated before the next forward.

    Shapes: x_t, x_0, eps (B, 4, h, w), the start, clean latent and noise of each chosen branch; t (B,) where it
    starts; active (B, m) bool, from the score pass; a row without any active step carries no gradient.
    """
    from sharpening.trajectory import weighted_errors

    weights = active.to(x_t.dtype) / active.sum(1, keepdim=True).clamp(min=1) / len(active)  # (B, m)
    detach, target = not args.backprop_through_sampler, (args.branch_target, args.snr_gamma)
    yield from weighted_errors(predict, schedule, x_t, t, x_0, eps, weights, guide, detach, *target)


def main(args: argparse.Namespace) -> int:
    """Train; returns the exit status: 0 finished, 1 stopped by a failing reward or loss, 128 + n by signal n."""
    # Imported here, so that --help and a mistyped flag are answered before seconds of imports, --dry_run before those
    # of diffusers' models.
    import math
    import time
    from contextlib import nullcontext
    from pathlib import Path

    from sharpening import model_source
    from sharpening.data.captioned_images import load_captioned_images
    from sharpening.running import launching
    from sharpening.trajectory import Schedule

    # -------------------------------------------------------------------------------------------- FLAGS TO RUN
    accelerator = launching.make_accelerator(args)
    device, world_size, is_main = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    weight_dtype = launching.weight_dtype(accelerator)
    output_dir = Path(args.output_dir)
    source = model_source.pipeline_source(args)
    scheduler_config = source.read_json("scheduler/scheduler_config.json")
    validate_schedule(args, scheduler_config["num_train_timesteps"])
    schedule = Schedule.from_config(scheduler_config, args.infer_steps, args.prediction_type)
    images = load_captioned_images(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        image_column=args.image_column,
        caption_column=args.caption_column,
        max_train_samples=args.max_train_samples,
        seed=args.seed or 0,
        cache_dir=args.cache_dir,
    )

    n, m, batch_size = args.num_noisy_latents, args.trajectory_nums, args.train_batch_size
    accumulation = args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(images) / (batch_size * accumulation * world_size))
    num_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    if is_main:
        trained_on = f"{len(images)} rows of {args.dataset_name or args.train_data_dir}"
        cost = rows_per_step(args)
        print(launching.describe(args, source, accelerator, trained_on, cost, steps_per_epoch, num_steps), flush=True)
    if args.dry_run:
        return 0

    import torch
    from diffusers.optimization import get_scheduler
    from torch.utils.data import DataLoader

    from reward import load_reward
    from sharpening import draws, run, sdxl
    from sharpening.data.encoding_cache import cache_latents_and_embeddings, collate
    from sharpening.rewards.calling import RewardError
    from sharpening.running import checkpoints, publishing, tracking
    from sharpening.running.validation import Validation, averaged_weights
    from sharpening.trajectory import score_branches, select

    run.quiet_libraries()
    checkpoint = checkpoints.prepare_output(accelerator, args)
    start_step, run_id = checkpoints.resolve_run(accelerator, args, checkpoint)
    reward = load_reward(args.reward_model, device, **run.reward_options(args, world_size))
    run.start_trackers(accelerator, args, run_id)

    # -------------------------------------------------------------------------------------------------- MODELS
    vae = sdxl.load_vae(args, source, device, weight_dtype)
    reward_decoder = sdxl.load_reward_decoder(args, device, weight_dtype) if args.reward_vae else vae
    unet = sdxl.load_unet(args, source, device, weight_dtype)
    parameters = sdxl.trainable_parameters(unet)
    ema = run.make_ema(unet, parameters, args, device) if args.use_ema else None
    optimizer = run.make_optimizer(parameters, args, world_size, scaled=accelerator.scaler is not None)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=num_steps
    )
    model, optimizer = accelerator.prepare(unet, optimizer)
    checkpoints.register_checkpointing(accelerator, unet, ema, lr_scheduler)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))

    # ---------------------------------------------------------------------------------------------------- DATA
    encoders = sdxl.TextEncoders.load(source, device, weight_dtype)
    unconditional = sdxl.unconditional_embedding(source, encoders)
    validation = Validation(args, encoders, unconditional)
    cached = cache_latents_and_embeddings(
        images,
        image_column=args.image_column,
        caption_column=args.caption_column,
        resolution=args.resolution,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        seed=args.seed,
        encode_images=lambda pixels: sdxl.encode_images(vae, pixels),
        encode_prompts=encoders.encode,
        batch_size=args.decode_batch_size,
        key={"vae": model_source.vae_identity(args, source), "text": model_source.text_identity(source)},
        cache_dir=args.cache_dir,
        dtype=weight_dtype,
    )
    del encoders
    sampler = draws.DrawSampler(
        len(cached), batch_size, accelerator.process_index, world_size, accumulation, args.seed, start_step, num_steps
    )
    workers = {"num_workers": args.dataloader_num_workers, "pin_memory": device.type == "cuda"}
    batches = iter(DataLoader(cached, batch_sampler=sampler, collate_fn=collate, **workers))
    probabilities = draws.timestep_probabilities(args, schedule.num_train_timesteps)  # (T,)

    # ------------------------------------------------------------------------------------------------ TRAINING
    stop = run.StopSignal()
    means = tracking.Means(device)
    log = tracking.StepLog(accelerator, args, parameters, start_step, num_steps)
    step, metrics = start_step, {}
    for step in range(start_step + 1, num_steps + 1):
        started, failure = time.perf_counter(), ""
        for micro_batch in range(accumulation):
            # ------------------------------------------------------------------------------------------ SAMPLE
            batch = next(batches)
            prompts = batch["caption"]
            x_0 = batch["latents"].to(device, torch.float32)  # (B, 4, h, w)
            sample = draws.draw_branches(args, batch["draw"], n, x_0.shape[1:], probabilities)
            eps, t = sample.eps.to(device), sample.t.to(device)  # (B, n, 4, h, w), (B,)
            condition = sdxl.Condition.of(batch, device).without_prompt(unconditional, sample.dropped)
            # Rows b * n + i are branch i of prompt b; all branches of a prompt share t.
            x_0, t, eps = x_0.repeat_interleave(n, 0), t.repeat_interleave(n), eps.flatten(0, 1)  # (B * n, ...)
            x_t = schedule.add_noise(x_0, eps, t)

            # ------------------------------------------------------------------------------------------- SCORE
            def model_of(rows: Tensor, condition: sdxl.Condition = condition) -> tuple:
                return sdxl.branch_model(unet, condition.rows(rows // n), unconditional, args.branch_guidance_scale)

            def judge(x0_hat: Tensor, rows: Tensor, prompts: list[str] = prompts) -> Callable[[], tuple]:
                decoded = sdxl.decode_latents(reward_decoder, x0_hat, args.decode_batch_size)
                return reward.begin(decoded, [prompts[row // n] for row in rows])

            try:
                scores = score_branches(model_of, judge, schedule, x_t, t, m, args.score_batch_size)
            except RewardError as error:
                failure = f"step {step}: {error}"
            if run.any_rank(accelerator, bool(failure)):
                return run.fail(accelerator, args, step - 1, run_id, failure or "the reward failed on another process")

            # ------------------------------------------------------------------------------------------ SELECT
            by_prompt = (batch_size, n, m)
            selection = select(scores.rewards.view(by_prompt), scores.active.view(by_prompt))
            best = torch.arange(batch_size) * n + selection.best  # (B,) row of the chosen branch
            usable = selection.scored.any(1)  # (B,) a prompt without any score teaches nothing

            # ------------------------------------------------------------------------------------------- TRAIN
            predict, guide = sdxl.branch_model(model, condition, unconditional, args.branch_guidance_scale)
            losses = sft_losses(
                args,
                predict,
                guide,
                schedule,
                x_t[best],
                t[best],
                x_0[best],
                eps[best],
                (scores.active[best] & usable[:, None]).to(device),
            )
            loss = pending = torch.zeros((), device=device)
            for k in range(m):
                # Processes exchange gradients once per optimizer step, in its last backward.
                exchange = micro_batch == accumulation - 1 and k == m - 1
                with nullcontext() if exchange else accelerator.no_sync(model):
                    pending = pending + next(losses) / accumulation
                    if k == m - 1 or not args.backprop_through_sampler:
                        accelerator.backward(pending)
                        loss, pending = loss + pending.detach(), torch.zeros_like(loss)
            mean_loss = loss * accumulation * batch_size / usable.sum().clamp(min=1)  # over the prompts that count
            means.add("loss", mean_loss.expand(batch_size), usable)
            tracking.add_rewards(means, scores, selection, t.view(batch_size, n)[:, 0].cpu(), schedule)

        # ------------------------------------------------------------------------------- CLIP, STEP, LOG, SAVE
        metrics = means.reduce(accelerator)
        if not math.isfinite(metrics.get("loss", 0)):  # absent if no prompt of the step could be scored
            message = (
                f"step {step}: the loss is {metrics['loss']}; lower --learning_rate or use --mixed_precision=bf16"
            )
            return run.fail(accelerator, args, step - 1, run_id, message)
        metrics["grad_norm"] = float(accelerator.clip_grad_norm_(parameters, args.max_grad_norm))
        metrics["lr"] = lr_scheduler.get_last_lr()[0]
        # A GradScaler skips such a step and lowers its scale; without one it would spoil the weights for good.
        if accelerator.scaler is None and not math.isfinite(metrics["grad_norm"]):
            message = f"step {step}: the gradient is not finite; lower --learning_rate"
            return run.fail(accelerator, args, step - 1, run_id, message)
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
            if ema is not None:
                ema.step(parameters)
        optimizer.zero_grad()
        metrics["samples_per_second"] = batch_size * accumulation * world_size / (time.perf_counter() - started)

        if is_main and step % args.branch_image_steps == 0:
            worst = torch.arange(batch_size) * n + selection.worst
            shown = {"branches/best": scores.last_estimate[best], "branches/worst": scores.last_estimate[worst]}
            shown = {name: sdxl.decode_latents(vae, x, args.decode_batch_size) for name, x in shown.items()}
            tracking.log_images(accelerator, output_dir, shown, step)
        failure = validation.step(accelerator, step, steps_per_epoch, metrics, unet, ema, vae, schedule, reward)
        log.write(step, metrics)
        if run.any_rank(accelerator, bool(failure)):
            return run.fail(accelerator, args, step, run_id, failure or "the reward failed on another process")
        signal_number = run.any_rank(accelerator, stop.number)
        if step % args.checkpointing_steps == 0 or signal_number:
            checkpoints.save_checkpoint(accelerator, args, step, run_id)
        if signal_number:
            return run.interrupted(accelerator, step, signal_number)

    # ---------------------------------------------------------------------------------------------------- SAVE
    log.progress.close()
    if is_main:
        with averaged_weights(unet, ema):
            saved = publishing.save_result(args, source, unet, vae, step, metrics)
        tracking.plot_rewards(log.path, output_dir / "reward_curve.png")
        print(f"saved the {saved} and reward_curve.png to {output_dir}", flush=True)
    run.finish(accelerator)
    if is_main and args.push_to_hub:
        publishing.push_to_hub(args)
    return 0


def cli(argv: Sequence[str]) -> int:
    """`main` on a command line; a `UserError` becomes one sentence on stderr and status 2."""
    return exit_status(lambda: main(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
