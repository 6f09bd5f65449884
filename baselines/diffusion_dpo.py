"""Diffusion-DPO of SDXL (Wallace et al., arXiv 2311.12908) on pairs of the base model's own samples, drawn once.

For every prompt:
    GENERATE  n latents with the reference, the first time that a set of the prompt is shown; they are kept.
    SCORE     reward each of them, once.
    SELECT    the latents with the largest and the smallest reward.
    SAMPLE    one noise and one timestep t; noise both alike.
    TRAIN     -log sigmoid(beta (r_best - r_worst)), r = -(|eps - eps_theta|^2 - |eps - eps_ref|^2).
With --rounds=K the run consists of K equal parts. Each begins from the (averaged) result of the one before, which is
then the reference and draws new pairs, with a fresh optimizer and learning rate: IterPO, as the paper's table has it.
Left out of the published algorithm: images that people compared, which `baselines/diffusion_dpo_dataset.py` trains on;
here the pairs come from a reward.

    accelerate launch baselines/diffusion_dpo.py --pretrained_model_name_or_path=MODEL --prompts_file=prompts.txt \
        --reward_model=clip --num_noisy_latents=4 --sets=10 --resolution=512 --mixed_precision=fp16
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

    from sharpening.regression import Preference

PAIRS = (
    *run_flags.PROMPTS,
    run_flags.NUM_NOISY_LATENTS,
    run_flags.INFER_STEPS,
    run_flags.GUIDANCE_SCALE,
    run_flags.SETS,
    run_flags.BETA_DPO,
    Flag("rounds", "parts of the run, each with the result of the one before as its reference", int, 1, "[1, inf)"),
)
FLAGS: flags.Groups = {
    **run_flags.RUN_FLAGS, "noise and timesteps": run_flags.NOISING, "pairs": PAIRS, "reward": REWARD_FLAGS,
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
    require(n >= 2, f"--num_noisy_latents is {n}, but a pair needs 2 samples or more; raise it")
    require(args.train_rows >= 2, f"--train_rows is {args.train_rows}, but a pair has 2 rows; raise it")
    return args


def rows_per_step(args: argparse.Namespace) -> dict[str, float]:
    """Rows that one process puts through the UNet in an optimizer step, by purpose, and through the decoder: 2 of each
    prompt for the reference and 2 to train. `rows_before` has what the pairs cost."""
    pairs = args.train_batch_size * args.gradient_accumulation_steps
    return {"reference": 2 * pairs, "train": 2 * pairs, "decode": 0}


def rows_before(args: argparse.Namespace, prompts: int) -> dict[str, float]:
    """Rows that drawing and judging all sets of all prompts takes, over all processes and rounds."""
    samples = prompts * args.sets * args.num_noisy_latents * args.rounds
    return {"generate": samples * args.infer_steps * run_flags.guided_rows(args.guidance_scale), "decode": samples}


def dpo_loss(beta: float, errors: Tensor, reference_errors: Tensor) -> Preference:
    """`-log sigmoid(beta (r_best - r_worst))`, `r = -(e_theta - e_ref)` (eq. 14); errors (B, 2), best first, of pairs.

    beta multiplies the difference as it is; Diffusion-DPO's code halves its `beta_dpo`.
    """
    from torch.nn.functional import logsigmoid

    from sharpening.regression import Preference

    log_ratios = -(errors - reference_errors)  # (B, 2)
    logits = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    return Preference(-logsigmoid(logits), logits, log_ratios)


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
    plan = Plan(args, FLAGS, Method("Diffusion-DPO", "diffusion-dpo", "2311.12908"))
    schedule, accelerator, device = plan.schedule, plan.accelerator, plan.device
    prompt_data = load_prompts(prompts_file=args.prompts_file, **plan.data_options())
    n, prompts_per_step = args.num_noisy_latents, args.train_batch_size * args.gradient_accumulation_steps
    before = rows_before(args, len(prompt_data.dataset))
    facts = {
        "pairs": f"best and worst of n = {n} samples, {args.sets} sets per prompt, {args.rounds} rounds",
        "drawn once": f"{before['generate']:g} rows to generate, {before['decode']:g} decodes, in all",
    }
    copied = not args.use_lora
    plan.settle(len(prompt_data.dataset), prompt_data.description, rows_per_step(args), facts, frozen=copied)
    rounds, steps = args.rounds, plan.num_steps
    require(rounds <= steps, f"--rounds is {rounds}, but the run has only {steps} optimizer steps; lower it")
    if args.dry_run:
        return 0

    import torch

    from sharpening import sdxl
    from sharpening.data.encoding_cache import cache_embeddings
    from sharpening.generation import SampleSets
    from sharpening.regression import Regression
    from sharpening.run import Run
    from sharpening.running.curves import Means, add_divergence, add_preference, add_rewards
    from sharpening.running.reward_scaling import RewardScaling
    from sharpening.selection import select
    from sharpening.trajectory import Branches
    from sharpening.transfer import slices, upload

    run = Run(plan)
    reward = load_reward(args.reward_model, device, processes=plan.world_size, **reward_options(vars(args)))
    run.start_trackers()

    # ----------------------------------------------------------------------------------------- MODELS AND DATA
    vae, reward_decoder = run.models.decoders()
    unet = run.models.unet()
    reference = run.models.reference(unet)
    parameters = sdxl.trainable_parameters(unet)
    optimizer, lr_scheduler, ema = run.make_optimizer(unet, args.rounds)
    of_round = {"steps": steps}  # of the whole run; and the reference of this round, once it is not the base
    scaling = RewardScaling(args.reward_scaling, reward.components, plan.hosts, of_round)
    model, optimizer = run.prepare(unet, optimizer, lr_scheduler, ema, shared=of_round)
    require(
        rounds == 1 or of_round["steps"] == steps,
        f"--max_train_steps is {steps}, but the rounds of this checkpoint are parts of {of_round['steps']} steps; "
        "give as many, or start a new run",
    )
    if "reference" in of_round:
        reference.load(of_round["reference"])
    regression = Regression(schedule, snr_gamma=args.snr_gamma)

    encoders, unconditional = run.models.text_encoders()
    run.validate_with(encoders, unconditional, vae, reward)
    data = cache_embeddings(prompt_data.dataset, encode_prompts=encoders.encode, **run.cache_options())
    del encoders
    batches, draws = run.batches(data), run.draws()
    shape = sdxl.latent_shape(vae, args.resolution)
    samples = SampleSets(args.sets, len(data), n, shape, args.seed)
    time_ids = sdxl.default_time_ids(prompts_per_step, args.resolution, device)

    # ------------------------------------------------------------------------------------------------ TRAINING
    means = Means(device)
    for step in run.steps(unet):
        # Parts as equal as whole steps can be.
        samples.begin_round((step - 1) * rounds // steps)
        if step > 1 and samples.round != (step - 2) * rounds // steps:
            run.restart(unet, optimizer, lr_scheduler, ema)
            reference.renew()
            of_round["reference"] = reference.state()
        # -------------------------------------------------------------------------------------------- GENERATE
        batch = next(batches)
        prompts = batch["caption"]  # all P of the step, however it is accumulated
        condition = sdxl.Condition.of({**batch, "time_ids": time_ids}, device)
        keys = samples.keys(batch["draw"].tolist(), prompts)
        unet.eval()
        with torch.no_grad(), run.phase("generation"), reference.unet() as frozen, accelerator.autocast():
            drawing = sdxl.Denoiser(frozen, condition, unconditional, args.guidance_scale)
            samples.draw(keys, drawing, schedule, args.generation_batch_size, run.same_forwards)
        x_0 = upload(samples.latents(keys), device)  # (P * n, 4, h, w)

        # ----------------------------------------------------------------------------------------------- SCORE
        def judge(latents: Tensor, rows: list[int], prompts: list[str] = prompts) -> Callable[[], tuple]:
            decoded = sdxl.decode_latents(reward_decoder, upload(latents, device), args.decode_batch_size)
            return reward.begin(decoded, [prompts[row // n] for row in rows])

        with run.together(step, x_0):
            samples.judge(keys, judge, args.score_batch_size)
        scores = samples.scores(keys)

        # ---------------------------------------------------------------------------------------------- SELECT
        scores = scaling.apply(scores, n, means)
        selection = select(scores.rewards, scores.active, n)
        decided = selection.decided  # (P,) the others carry no preference
        rows = torch.stack([selection.best_rows, selection.worst_rows], 1).flatten()  # (2 P,): best, worst, ...
        add_rewards(means, scores, selection)

        # ---------------------------------------------------------------------------------------------- SAMPLE
        noising = draws.noising(batch["draw"], 1, shape)
        eps, t = upload(noising.eps[:, 0].repeat_interleave(2, 0), device), noising.t.repeat_interleave(2)
        pairs = Branches.begin(schedule, x_0[upload(rows, device)], eps, t)  # 2 P of them
        condition = condition.without_prompt(unconditional, noising.dropped).repeat(2)

        # ----------------------------------------------------------------------------------------------- TRAIN
        unet.train()
        path, rewards = pairs.start(), selection.branch_reward.flatten()[rows].view(-1, 2)
        with torch.no_grad(), run.phase("reference"), reference.unet() as frozen, accelerator.autocast():
            reference_output = sdxl.predict_along(frozen, path, condition, args.train_rows)  # (2 P, 1, 4, h, w)
        reference_errors = regression.errors(pairs, path, reference_output)  # (2 P, 1)
        counts = upload(decided, device)
        parts = list(slices(len(t), args.train_rows // 2 * 2))  # a loss of whole pairs
        for part in parts:
            some, of_some, which = pairs.rows(part), path.rows(part), slice(part.start // 2, part.stop // 2)
            with run.exchange(model, part is parts[-1]):
                output = sdxl.predict_along(model, of_some, condition.rows(part))  # (r, 1, 4, h, w)
                errors = regression.errors(some, of_some, output).view(-1, 2)
                preference = dpo_loss(args.beta_dpo, errors, reference_errors[part].view(-1, 2))
                accelerator.backward((preference.loss * counts[which]).sum() / len(decided))
            add_preference(means, preference, rewards[which], decided[which])
            add_divergence(means, output.detach(), reference_output[part], of_some.active)

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
        run.log_branches(step, prompts, x_0, scores, best=rows[::2], worst=rows[1::2])
        run.end_step(step, metrics, unet, ema)

    # ---------------------------------------------------------------------------------------------------- SAVE
    run.finish(unet, ema)
    return 0


def cli(argv: Sequence[str]) -> int:
    """`main` on a command line; a `UserError` becomes one sentence on stderr and status 2."""
    return exit_status(lambda: main(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
