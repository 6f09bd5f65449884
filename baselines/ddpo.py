"""DDPO of SDXL (Black et al., arXiv 2305.13301): a policy gradient on the model's own stochastic sampling paths.

For every prompt:
    SAMPLE   n latents along stochastic paths (DDIM with eta = 1, T steps), with the model as it is.
    SCORE    reward each of them; its advantage is its reward by the mean and spread of its prompt's n.
    TRAIN    -A log p_theta(x_(t-1) | x_t, c) on m of each path's steps.
A step of the path is Gaussian with a mean that is linear in the model's output, so its log-density is a squared error
with a known weight, and TRAIN is the same regression on rows as everywhere.
Left out of the published algorithm: several updates on the same samples. Each path serves one update, so the ratio of
importance sampling is 1 and its clipping idle. The last step of a path is deterministic and not trained on.

    accelerate launch baselines/ddpo.py --pretrained_model_name_or_path=MODEL --prompts_file=prompts.txt \
        --reward_model=clip --num_noisy_latents=8 --trajectory_nums=4 --resolution=512 --mixed_precision=fp16
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from reward import REWARD_FLAGS, check_reward_flags, load_reward, reward_options
from sharpening import flags, run_flags
from sharpening.errors import exit_status, require

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sharpening.selection import Selection

PATHS = (*run_flags.PROMPTS, run_flags.NUM_NOISY_LATENTS, run_flags.TRAJECTORY_NUMS, run_flags.INFER_STEPS)
FLAGS: flags.Groups = {
    **run_flags.RUN_FLAGS, "paths": PATHS, "reward": REWARD_FLAGS, "selection": run_flags.SELECTION,
}  # fmt: skip


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The resolved flags of a run.

    Raises:
        UserError: naming the flag and the remedy.
    """
    args = run_flags.parse_run(__doc__.splitlines()[0], FLAGS, argv)
    check_reward_flags(vars(args))
    n, m, steps = args.num_noisy_latents, args.trajectory_nums, args.infer_steps
    require(n >= 2, f"--num_noisy_latents is {n}, but an advantage needs 2 samples or more; raise it")
    require(
        m < steps,
        f"--trajectory_nums is {m}, but a path of --infer_steps={steps} has {steps - 1} steps to train on; lower it",
    )
    unheeded = "--proportion_empty_prompts says nothing to DDPO, which trains on its own paths; leave it out"
    require(not args.proportion_empty_prompts, unheeded)
    return args


def rows_per_step(args: argparse.Namespace) -> dict[str, float]:
    """Rows that one process puts through the UNet in an optimizer step, by purpose, and through the decoder: with P
    prompts and n samples of T steps, P n T to generate and P n m to train."""
    samples = args.train_batch_size * args.gradient_accumulation_steps * args.num_noisy_latents
    return {"generate": samples * args.infer_steps, "train": samples * args.trajectory_nums, "decode": samples}


def advantages(selection: Selection) -> Tensor:
    """Each sample's reward by its prompt's own mean and standard deviation, (B, n) in [-5, 5]; 0 without a reward or
    where all of a prompt's samples earn the same."""
    import torch

    reward, count = selection.branch_reward, selection.scored.sum(1, keepdim=True).clamp(min=1)
    deviation = (reward - reward.nanmean(1, keepdim=True)).nan_to_num(0.0)
    spread = (deviation.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(selection.tied[:, None], 0, deviation / spread.clamp(min=1e-8)).clamp(-5, 5)


def main(args: argparse.Namespace) -> int:
    """Train; returns 0 when finished.

    Raises:
        Stop: with status 1 if a reward or the loss failed, 128 + n by signal n.
    """
    # Imported here, so that --help and --dry_run are answered before seconds of imports.
    from sharpening.data.prompts import load_prompts
    from sharpening.running.plan import Method, Plan
    from sharpening.stochastic import check_start

    # -------------------------------------------------------------------------------------------- FLAGS TO RUN
    plan = Plan(args, FLAGS, Method("DDPO", "ddpo", "2305.13301"))
    schedule, accelerator, device = plan.schedule, plan.accelerator, plan.device
    check_start(schedule, plan.method.name)
    prompt_data = load_prompts(prompts_file=args.prompts_file, **plan.data_options())
    n, m = args.num_noisy_latents, args.trajectory_nums
    prompts_per_step = args.train_batch_size * args.gradient_accumulation_steps
    facts = {"paths": f"n = {n} of {args.infer_steps} steps per prompt, m = {m} of them trained on"}
    plan.settle(len(prompt_data.dataset), prompt_data.description, rows_per_step(args), facts)
    if args.dry_run:
        return 0

    import torch

    from sharpening import sdxl
    from sharpening.data.encoding_cache import cache_embeddings
    from sharpening.draws import draw_noise, draw_paths
    from sharpening.regression import Rows
    from sharpening.run import Run
    from sharpening.running.curves import Means, add_rewards
    from sharpening.running.reward_scaling import RewardScaling
    from sharpening.selection import begin_samples, select
    from sharpening.stochastic import Transitions, sample_paths
    from sharpening.transfer import slices, upload

    run = Run(plan)
    reward = load_reward(args.reward_model, device, processes=plan.world_size, **reward_options(vars(args)))
    run.start_trackers()

    # ----------------------------------------------------------------------------------------- MODELS AND DATA
    vae, reward_decoder = run.models.decoders()
    unet = run.models.unet()
    parameters = sdxl.trainable_parameters(unet)
    optimizer, lr_scheduler, ema = run.make_optimizer(unet)
    scaling = RewardScaling(args.reward_scaling, reward.components, plan.hosts)
    model, optimizer = run.prepare(unet, optimizer, lr_scheduler, ema, shared=scaling.kept)

    encoders, unconditional = run.models.text_encoders()
    run.validate_with(encoders, unconditional, vae, reward)
    data = cache_embeddings(prompt_data.dataset, encode_prompts=encoders.encode, **run.cache_options())
    del encoders
    batches = run.batches(data)
    shape = sdxl.latent_shape(vae, args.resolution)
    time_ids = sdxl.default_time_ids(prompts_per_step, args.resolution, device)

    # ------------------------------------------------------------------------------------------------ TRAINING
    means = Means(device)
    for step in run.steps(unet):
        # ---------------------------------------------------------------------------------------------- SAMPLE
        batch = next(batches)
        prompts, draws = batch["caption"], batch["draw"].tolist()  # all P of the step, however it is accumulated
        condition = sdxl.Condition.of({**batch, "time_ids": time_ids}, device)
        condition = condition.repeat(n)  # rows b * n + i are sample i of prompt b
        denoiser = sdxl.Denoiser(unet, condition, unconditional, 1.0)
        noise = draw_noise(args.seed, draws, n, shape).flatten(0, 1)
        drawn = (noise, *draw_paths(args.seed, draws, n, shape, args.infer_steps, m))
        unet.eval()
        # One autocast around the pass: it converts the weights once, and forgets them before a gradient is taken.
        with torch.no_grad(), run.phase("generation"), accelerator.autocast():
            sampled = [
                sample_paths(denoiser.rows(part), schedule, *(upload(of[part], device) for of in drawn))
                for part in slices(len(noise), args.generation_batch_size)
            ]
        x_0 = torch.cat([part[0] for part in sampled])  # (P * n, 4, h, w)
        path = Transitions(*map(torch.cat, zip(*(part[1] for part in sampled), strict=True)))

        # ----------------------------------------------------------------------------------------------- SCORE
        def judge(latents: Tensor, rows: list[int], prompts: list[str] = prompts) -> Callable[[], tuple]:
            decoded = sdxl.decode_latents(reward_decoder, latents, args.decode_batch_size)
            return reward.begin(decoded, [prompts[row // n] for row in rows])

        with run.together(step, x_0):
            scores = begin_samples(judge, x_0, args.score_batch_size)()
        scores = scaling.apply(scores, n, means)
        selection = select(scores.rewards, scores.active, n)
        advantage = upload(advantages(selection).flatten(), device)  # (P * n,)
        add_rewards(means, scores, selection)

        # ----------------------------------------------------------------------------------------------- TRAIN
        unet.train()
        loss = torch.zeros((), device=device)
        weight = advantage[:, None] * path.precision / (m * len(advantage))  # (P * n, m)
        x, t, target = (part.flatten(0, 1) for part in path[:3])
        parts = Rows(x, t, condition.repeat(m), target, weight.flatten()).split(args.train_rows)
        for rows in parts:
            with run.exchange(model, rows is parts[-1]):
                of_rows = rows.loss(sdxl.predict_output(model, rows.x, rows.t, rows.condition))
                accelerator.backward(of_rows)
            loss = loss + of_rows.detach()
        means.add("loss", loss)

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
        metrics |= run.speed("generation")
        run.log_branches(step, prompts, x_0, scores, best=selection.best_rows, worst=selection.worst_rows)
        run.end_step(step, metrics, unet, ema)

    # ---------------------------------------------------------------------------------------------------- SAVE
    run.finish(unet, ema)
    return 0


def cli(argv: Sequence[str]) -> int:
    """`main` on a command line; a `UserError` becomes one sentence on stderr and status 2."""
    return exit_status(lambda: main(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
