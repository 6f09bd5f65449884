"""SFT Diffusion-Sharpening of SDXL (Tian et al., arXiv 2502.12146, algorithm 1).

For every image-text pair:
    SAMPLE  n noises and one timestep t; noise the image's latent n ways.
    SCORE   walk m sampling steps from each of the n branches without gradient; reward the clean estimate of each step.
    SELECT  the branch with the largest summed reward (eq. 8), prompt by prompt.
    TRAIN   regress to that branch's noise on the m states that it went through (eq. 9).
States along a branch are data, so they are trained on as rows, in slices of `--train_rows`: the gradient is that of
the whole loss, and peak memory is that of a slice, whatever n and m. With n = 1 there is nothing to select and nothing
is judged; n = m = 1 is standard fine-tuning.

    accelerate launch train_sft_diffusion_sharpening_sdxl.py --pretrained_model_name_or_path=MODEL \
        --dataset_name=DATA --reward_model=clip --resolution=512 --train_batch_size=1 --mixed_precision=fp16
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from reward import REWARD_FLAGS, check_reward_flags, load_reward, reward_options
from sharpening import flags
from sharpening.errors import exit_status, require
from sharpening.run_flags import NOISING, RUN_FLAGS, SELECTION, TRAJECTORY, guided_rows, parse_run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

FLAGS: flags.Groups = {
    **RUN_FLAGS, "method": TRAJECTORY, "noise and timesteps": NOISING, "reward": REWARD_FLAGS, "selection": SELECTION,
}  # fmt: skip


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The resolved flags of a run.

    Raises:
        UserError: naming the flag and the remedy.
    """
    args = parse_run(__doc__.splitlines()[0], FLAGS, argv)
    check_reward_flags(vars(args))
    unheeded = "--reward_scaling has no effect with --num_noisy_latents=1, which selects nothing; leave it out"
    require(args.num_noisy_latents > 1 or args.reward_scaling == "none", unheeded)
    return args


def rows_per_step(args: argparse.Namespace) -> dict[str, float]:
    """Rows that one process puts through the UNet in an optimizer step, by purpose, and through the decoder.

    With P prompts, n branches of m steps, and 2 rows where a branch is guided: P n m to score, P m to train. With
    n = 1 the score pass only walks to the last state, P (m - 1), and judges nothing. Branches that end early, below
    t = 0, cost less.
    """
    prompts = args.train_batch_size * args.gradient_accumulation_steps
    n, m = args.num_noisy_latents, args.trajectory_nums
    guided = guided_rows(args.branch_guidance_scale)
    return {
        "score": prompts * (n * m if n > 1 else m - 1) * guided,
        "train": prompts * m * (guided if args.backprop_through_sampler else 1),
        "decode": prompts * n * m if n > 1 else 0,
    }


def sft_weights(active: Tensor, usable: Tensor) -> Tensor:
    """Equation 9 as weights (B, m) of the errors of B chosen branches: the mean over prompts of the mean over steps.

    active (B, m) bool: a branch's steps; usable (B,) bool: a prompt without any score teaches nothing, and counts in
    the divisor.
    """
    return (active & usable[:, None]) / active.sum(1, keepdim=True) / len(active)


def main(args: argparse.Namespace) -> int:
    """Train; returns 0 when finished.

    Raises:
        Stop: with status 1 if a reward or the loss failed, 128 + n by signal n.
    """
    # Imported here, so that --help and a mistyped flag are answered before seconds of imports, --dry_run before those
    # of diffusers' models.
    from sharpening.data.captioned_images import load_captioned_images
    from sharpening.running.plan import Method, Plan

    # -------------------------------------------------------------------------------------------- FLAGS TO RUN
    plan = Plan(args, FLAGS, Method("SFT Diffusion-Sharpening", "diffusion-sharpening", "2502.12146"))
    schedule, accelerator, device = plan.schedule, plan.accelerator, plan.device
    images = load_captioned_images(image_column=args.image_column, **plan.data_options())
    n, m, guidance_scale = args.num_noisy_latents, args.trajectory_nums, args.branch_guidance_scale
    prompts_per_step = args.train_batch_size * args.gradient_accumulation_steps
    facts = {"preset": f"{args.preset} (n = {n} branches, m = {m} steps of {args.infer_steps} per trajectory)"}
    described = f"{len(images)} rows of {args.dataset_name or args.train_data_dir}"
    plan.settle(len(images), described, rows_per_step(args), facts)
    if args.dry_run:
        return 0

    import torch

    from sharpening import sdxl
    from sharpening.data.encoding_cache import cache_latents_and_embeddings
    from sharpening.regression import Regression
    from sharpening.run import Run
    from sharpening.running.curves import Means, add_rewards
    from sharpening.running.reward_scaling import RewardScaling
    from sharpening.selection import score_branches, select
    from sharpening.trajectory import Branches, outputs_through_sampler, walk_path
    from sharpening.transfer import slices, upload

    run = Run(plan)
    reward = None  # one branch needs none
    if n > 1 or run.validation_prompts:
        reward = load_reward(args.reward_model, device, processes=plan.world_size, **reward_options(vars(args)))
    run.start_trackers()

    # ----------------------------------------------------------------------------------------- MODELS AND DATA
    vae, reward_decoder = run.models.decoders()
    unet = run.models.unet()
    parameters = sdxl.trainable_parameters(unet)
    optimizer, lr_scheduler, ema = run.make_optimizer(unet)
    scaling = RewardScaling(args.reward_scaling, reward.components if reward else [], plan.hosts)
    model, optimizer = run.prepare(unet, optimizer, lr_scheduler, ema, shared=scaling.kept)
    regression = Regression(schedule, args.branch_target, args.snr_gamma)

    encoders, unconditional = run.models.text_encoders()
    run.validate_with(encoders, unconditional, vae, reward)
    data = cache_latents_and_embeddings(
        images,
        image_column=args.image_column,
        caption_column=args.caption_column,
        resolution=args.resolution,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        encode_images=lambda pixels: sdxl.encode_images(vae, pixels),
        encode_prompts=encoders.encode,
        **run.cache_options(images=True),
    )
    del encoders
    batches, draws = run.batches(data), run.draws()

    # ------------------------------------------------------------------------------------------------ TRAINING
    means = Means(device)
    for step in run.steps(unet):
        # ---------------------------------------------------------------------------------------------- SAMPLE
        batch = next(batches)
        prompts = batch["caption"]  # all P of the step, however it is accumulated
        x_0 = upload(batch["latents"], device).float()  # (P, 4, h, w)
        noising = draws.noising(batch["draw"], n, x_0.shape[1:])
        condition = sdxl.Condition.of(batch, device).without_prompt(unconditional, noising.dropped)
        # Rows b * n + i are branch i of prompt b; all branches of a prompt share t.
        eps, t = upload(noising.eps.flatten(0, 1), device), noising.t.repeat_interleave(n)
        branches = Branches.begin(schedule, x_0.repeat_interleave(n, 0), eps, t)  # P * n of them

        # ----------------------------------------------------------------------------------------------- SCORE
        def judge(x0_hat: Tensor, rows: list[int], prompts: list[str] = prompts) -> Callable[[], tuple]:
            decoded = sdxl.decode_latents(reward_decoder, x0_hat, args.decode_batch_size)
            return reward.begin(decoded, [prompts[row // n] for row in rows])

        walking = sdxl.Denoiser(unet, condition.repeat(n), unconditional, guidance_scale)
        best, usable = torch.arange(prompts_per_step), torch.ones(prompts_per_step, dtype=torch.bool)  # (P,) rows
        # One autocast around a whole pass: it converts the weights once, and forgets them before a gradient is taken.
        if n == 1:
            with run.phase("score"), accelerator.autocast():
                path = walk_path(walking.rows, schedule, branches, m, args.score_batch_size, outputs=False)
        else:
            with run.together(step), accelerator.autocast():
                scores, path = score_branches(
                    walking.rows, judge, schedule, branches, m, args.score_batch_size, run.same_forwards, outputs=False
                )

            # ------------------------------------------------------------------------------------------ SELECT
            scores = scaling.apply(scores, n, means)
            selection = select(scores.rewards, scores.active, n)
            best, usable = selection.best_rows, selection.scored.any(1)
            add_rewards(means, scores, selection, noising.t, schedule.num_train_timesteps)

        # ----------------------------------------------------------------------------------------------- TRAIN
        chosen, path = branches.rows(best), path.rows(best)
        weights = upload(sft_weights(path.active, usable), device)  # (P, m)
        unet.train()
        loss = torch.zeros((), device=device)
        if args.backprop_through_sampler:
            parts = list(slices(prompts_per_step, max(1, args.train_rows // m)))
            for part in parts:
                walking = sdxl.Denoiser(model, condition, unconditional, guidance_scale).rows(part)
                some, of_some = chosen.rows(part), path.rows(part)
                with run.exchange(model, part is parts[-1]):
                    output = outputs_through_sampler(walking, schedule, some, m)
                    of_part = (weights[part] * regression.errors(some, of_some, output)).sum()
                    accelerator.backward(of_part)
                loss = loss + of_part.detach()
        else:
            parts = regression.rows(chosen, path, condition, weights).split(args.train_rows, run.same_forwards)
            for rows in parts:
                with run.exchange(model, rows is parts[-1]):
                    of_rows = rows.loss(sdxl.predict_output(model, rows.x, rows.t, rows.condition))
                    accelerator.backward(of_rows)
                loss = loss + of_rows.detach()
        mean_loss = loss * (prompts_per_step / usable.sum().clamp(min=1).item())  # over the prompts that count
        means.add("loss", mean_loss.expand(prompts_per_step), usable)

        # ------------------------------------------------------------------------------- CLIP, STEP, LOG, SAVE
        means.add("grad_norm", accelerator.clip_grad_norm_(parameters, args.max_grad_norm))
        metrics = means.reduce(accelerator)
        metrics["lr"] = lr_scheduler.get_last_lr()[0]
        run.stop_if_diverged(step, metrics)
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
            if ema is not None:
                ema.step(parameters)
        optimizer.zero_grad(set_to_none=run.forgets_gradients)
        metrics |= run.speed()
        if n > 1:
            worst = selection.worst_rows
            run.log_branches(step, prompts, scores.last_estimate, scores, noising.t, best=best, worst=worst)
        run.end_step(step, metrics, unet, ema)

    # ---------------------------------------------------------------------------------------------------- SAVE
    run.finish(unet, ema)
    return 0


def cli(argv: Sequence[str]) -> int:
    """`main` on a command line; a `UserError` becomes one sentence on stderr and status 2."""
    return exit_status(lambda: main(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
