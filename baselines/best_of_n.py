"""Best-of-n fine-tuning of SDXL: regression on the best of n samples of the model itself, or of the base.

For every prompt:
    GENERATE  n latents: with the model as it is, anew each time; or with the base (--samples_of=base), the first time
              that a set of the prompt is shown, and kept.
    SCORE     reward each of them.
    SELECT    the latent with the largest reward.
    SAMPLE    one noise and one timestep t; noise it.
    TRAIN     |eps_theta(x_t, c, t) - eps|^2, standard fine-tuning on it.
A prompt whose samples all earn the same, or of which fewer than two have a score, teaches nothing.

    accelerate launch baselines/best_of_n.py --pretrained_model_name_or_path=MODEL --prompts_file=prompts.txt \
        --reward_model=clip --num_noisy_latents=4 --samples_of=base --sets=10 --resolution=512 --mixed_precision=fp16
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from reward import REWARD_FLAGS, check_reward_flags, load_reward, reward_options
from sharpening import flags, run_flags
from sharpening.errors import exit_status, require
from sharpening.flags import Flag

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

SAMPLES = (
    *run_flags.PROMPTS,
    run_flags.NUM_NOISY_LATENTS,
    run_flags.INFER_STEPS,
    run_flags.GUIDANCE_SCALE,
    Flag("samples_of", "the model as it is, or the base, which never changes", default="own", choices=("own", "base")),
    run_flags.SETS,
)
FLAGS: flags.Groups = {
    **run_flags.RUN_FLAGS, "noise and timesteps": run_flags.NOISING, "samples": SAMPLES, "reward": REWARD_FLAGS,
    "selection": run_flags.SELECTION,
}  # fmt: skip


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The resolved flags of a run.

    Raises:
        UserError: naming the flag and the remedy.
    """
    args = run_flags.parse_run(__doc__.splitlines()[0], FLAGS, argv)
    check_reward_flags(vars(args))
    n = args.num_noisy_latents
    require(n >= 2, f"--num_noisy_latents is {n}, but the best of fewer than 2 samples is no choice; raise it")
    require(args.sets == 1 or args.samples_of == "base", "--sets are of the base's samples; add --samples_of=base")
    return args


def rows_per_step(args: argparse.Namespace) -> dict[str, float]:
    """Rows that one process puts through the UNet in an optimizer step, by purpose, and through the decoder.

    With P prompts and n samples of T steps, of 2 rows each with guidance: P n T to generate and P to train. Samples of
    the base are drawn once: `rows_before` has what they cost.
    """
    prompts = args.train_batch_size * args.gradient_accumulation_steps
    samples = prompts * args.num_noisy_latents if args.samples_of == "own" else 0
    generated = samples * args.infer_steps * run_flags.guided_rows(args.guidance_scale)
    return {"generate": generated, "train": prompts, "decode": samples}


def rows_before(args: argparse.Namespace, prompts: int) -> dict[str, float]:
    """Rows that drawing and judging all sets of all prompts takes, over all processes."""
    samples = prompts * args.sets * args.num_noisy_latents if args.samples_of == "base" else 0
    return {"generate": samples * args.infer_steps * run_flags.guided_rows(args.guidance_scale), "decode": samples}


def main(args: argparse.Namespace) -> int:
    """Train; returns 0 when finished.

    Raises:
        Stop: with status 1 if a reward or the loss failed, 128 + n by signal n.
    """
    # Imported here, so that --help and a mistyped flag are answered before seconds of imports, --dry_run before those
    # of diffusers' models.
    from sharpening.data.prompts import load_prompts
    from sharpening.running.plan import Method, Plan

    # -------------------------------------------------------------------------------------------- FLAGS TO RUN
    plan = Plan(args, FLAGS, Method("best-of-n fine-tuning", "best-of-n", "2502.12146"))
    schedule, accelerator, device = plan.schedule, plan.accelerator, plan.device
    prompt_data = load_prompts(prompts_file=args.prompts_file, **plan.data_options())
    n, prompts_per_step = args.num_noisy_latents, args.train_batch_size * args.gradient_accumulation_steps
    of_base = args.samples_of == "base"
    before = rows_before(args, len(prompt_data.dataset))
    facts = {"samples": f"best of n = {n}, of {args.samples_of}"}
    if of_base:
        facts["drawn once"] = f"{before['generate']:g} rows to generate, {before['decode']:g} decodes, in all"
    copied = of_base and not args.use_lora
    plan.settle(len(prompt_data.dataset), prompt_data.description, rows_per_step(args), facts, frozen=copied)
    if args.dry_run:
        return 0

    import torch

    from sharpening import sdxl
    from sharpening.data.encoding_cache import cache_embeddings
    from sharpening.draws import draw_noise
    from sharpening.generation import SampleSets, generate_in_slices
    from sharpening.regression import Regression
    from sharpening.run import Run
    from sharpening.running.curves import Means, add_rewards
    from sharpening.running.reward_scaling import RewardScaling
    from sharpening.selection import begin_samples, select
    from sharpening.trajectory import Branches
    from sharpening.transfer import upload

    run = Run(plan)
    reward = load_reward(args.reward_model, device, processes=plan.world_size, **reward_options(vars(args)))
    run.start_trackers()

    # ----------------------------------------------------------------------------------------- MODELS AND DATA
    vae, reward_decoder = run.models.decoders()
    unet = run.models.unet()
    base = run.models.reference(unet) if of_base else None
    parameters = sdxl.trainable_parameters(unet)
    optimizer, lr_scheduler, ema = run.make_optimizer(unet)
    scaling = RewardScaling(args.reward_scaling, reward.components, plan.hosts)
    model, optimizer = run.prepare(unet, optimizer, lr_scheduler, ema, shared=scaling.kept)
    regression = Regression(schedule, snr_gamma=args.snr_gamma)

    encoders, unconditional = run.models.text_encoders()
    run.validate_with(encoders, unconditional, vae, reward)
    data = cache_embeddings(prompt_data.dataset, encode_prompts=encoders.encode, **run.cache_options())
    del encoders
    batches, draws = run.batches(data), run.draws()
    shape = sdxl.latent_shape(vae, args.resolution)
    kept = SampleSets(args.sets, len(data), n, shape, args.seed)
    time_ids = sdxl.default_time_ids(prompts_per_step, args.resolution, device)

    # ------------------------------------------------------------------------------------------------ TRAINING
    means = Means(device)
    for step in run.steps(unet):
        # -------------------------------------------------------------------------------------------- GENERATE
        batch = next(batches)
        prompts = batch["caption"]  # all P of the step, however it is accumulated
        condition = sdxl.Condition.of({**batch, "time_ids": time_ids}, device)
        unet.eval()
        if base is None:
            noise = draw_noise(args.seed, batch["draw"].tolist(), n, shape).flatten(0, 1)
            drawing = sdxl.Denoiser(unet, condition.repeat(n), unconditional, args.guidance_scale)
            with run.phase("generation"), accelerator.autocast():
                noise = upload(noise, device)
                x_0 = generate_in_slices(drawing.rows, schedule, noise, args.generation_batch_size)
        else:
            keys = kept.keys(batch["draw"].tolist(), prompts)
            with torch.no_grad(), run.phase("generation"), base.unet() as frozen, accelerator.autocast():
                drawing = sdxl.Denoiser(frozen, condition, unconditional, args.guidance_scale)
                kept.draw(keys, drawing, schedule, args.generation_batch_size, run.same_forwards)
            x_0 = upload(kept.latents(keys), device)  # (P * n, 4, h, w)

        # ----------------------------------------------------------------------------------------------- SCORE
        def judge(latents: Tensor, rows: list[int], prompts: list[str] = prompts) -> Callable[[], tuple]:
            decoded = sdxl.decode_latents(reward_decoder, upload(latents, device), args.decode_batch_size)
            return reward.begin(decoded, [prompts[row // n] for row in rows])

        with run.together(step, x_0):
            if base is None:
                scores = begin_samples(judge, x_0, args.score_batch_size)()
            else:
                kept.judge(keys, judge, args.score_batch_size)
                scores = kept.scores(keys)

        # ---------------------------------------------------------------------------------------------- SELECT
        scores = scaling.apply(scores, n, means)
        selection = select(scores.rewards, scores.active, n)
        decided = selection.decided  # (P,) of the others, none is the best
        add_rewards(means, scores, selection)

        # ---------------------------------------------------------------------------------------------- SAMPLE
        noising = draws.noising(batch["draw"], 1, shape)
        eps, chosen = upload(noising.eps[:, 0], device), upload(selection.best_rows, device)
        best = Branches.begin(schedule, x_0[chosen], eps, noising.t)  # P of them
        condition = condition.without_prompt(unconditional, noising.dropped)

        # ----------------------------------------------------------------------------------------------- TRAIN
        unet.train()
        loss = torch.zeros((), device=device)
        weights = upload((decided.float() / len(decided))[:, None], device)  # (P, 1)
        parts = regression.rows(best, best.start(), condition, weights).split(args.train_rows)
        for rows in parts:
            with run.exchange(model, rows is parts[-1]):
                of_rows = rows.loss(sdxl.predict_output(model, rows.x, rows.t, rows.condition))
                accelerator.backward(of_rows)
            loss = loss + of_rows.detach()
        mean_loss = loss * (len(decided) / decided.sum().clamp(min=1).item())  # over the prompts that count
        means.add("loss", mean_loss.expand(len(decided)), decided)

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
