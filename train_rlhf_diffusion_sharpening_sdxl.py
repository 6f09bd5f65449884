"""RLHF Diffusion-Sharpening of SDXL (Tian et al., arXiv 2502.12146, algorithm 2): prompts in, preference pairs online.

For every prompt:
    GENERATE  clean latents with the current model, by DDIM, without gradient.
    SAMPLE    n noises and one timestep t; noise the latents n ways.
    SCORE     walk m sampling steps from each of the n branches without gradient; reward the clean estimate of each
              step or, with --reward_on=sample, the generated latents themselves.
    SELECT    the branches with the largest and the smallest summed reward (eq. 8), prompt by prompt.
    COMPARE   the model's errors with those of a frozen reference along both branches: the preference loss (eq. 11).
    TRAIN     on the states that the pair went through; the loss has given each of their errors its weight by now.
States along a branch are data and the loss sees the model through its errors alone, so its gradient is a weighted sum
over rows, taken in slices of `--train_rows`: peak memory is that of a slice, whatever n and m.

    accelerate launch train_rlhf_diffusion_sharpening_sdxl.py --pretrained_model_name_or_path=MODEL \
        --prompts_file=prompts.txt --reward_model=clip --resolution=512 --train_batch_size=1 --mixed_precision=fp16
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from reward import REWARD_FLAGS, check_reward_flags, load_reward, reward_options
from sharpening import flags, run_flags
from sharpening.errors import exit_status, require
from sharpening.flags import Flag

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sharpening.regression import Preference

GENERATION = (
    *run_flags.PROMPTS,
    replace(run_flags.GUIDANCE_SCALE, default=None, presets={"paper": 5.0, "released": 1.0}),
    Flag("latents_per_prompt", "to branch from", choices=("1", "n"), presets={"paper": "1", "released": "n"}),
    Flag("generation_reuse", "optimizer steps that one generation serves", int, 1, "[1, inf)"),
    Flag(
        "branch_noise",
        "of the branches: noise of their own (paper), one noise for all of a prompt, as Diffusion-DPO has it, or that "
        "which their latents came from (released)",
        choices=("fresh", "shared", "generation"), presets={"paper": "fresh", "released": "generation"},
        switch=("share_noise_in_pair", "shared"),
    ),
)  # fmt: skip
PREFERENCE = (
    Flag(
        "reward_on", "what is judged: clean estimates along a branch (paper), or the generated latent it starts from",
        default="trajectory", choices=("trajectory", "sample"),
    ),
    run_flags.BETA_DPO,
    Flag(
        "worst_ratio_bound",
        "how far the worse branch is pushed away: at exp(-bound) of its likelihood, as beta counts it, it has no more "
        "gradient; inf: without end",
        float, math.inf, "(0, inf]",
    ),
    Flag("reward_margin_scale", "scale of the reward margin; 0: without", float, 1.0, "[0, inf)"),
    Flag(
        "reward_margin", "inside the log-sigmoid (eq. 11) or added to the loss, where it has no gradient (released)",
        choices=("inside", "outside"), presets={"paper": "inside", "released": "outside"},
    ),
    Flag(
        "reference_steps", "steps of a branch on which the reference is measured; the model is on all of them",
        choices=("all", "first"), presets={"paper": "all", "released": "first"},
    ),
)  # fmt: skip
# What gains most per forward (docs/study.md). Learning rate, beta and guidance are left out: they depend on the model.
EFFICIENT = {
    "reward_on": "sample",  # a clean estimate along a branch says little of the sample that it leads to
    "latents_per_prompt": "n",  # candidates that differ in what they show, not in their noise
    "branch_noise": "shared",  # one noise for all, as in Diffusion-DPO: errors differ by the image alone
    "num_noisy_latents": 8,  # the more candidates, the farther apart are best and worst
    "trajectory_nums": 1,  # the states of one step are those that the noised latents are
    "infer_steps": 20,  # samples good enough to be told apart; evaluation may use more
    "generation_reuse": 4,  # generating is most of the cost
    "timestep_bias_strategy": "range",  # where an image is laid out; details are no preference
    "timestep_bias_begin": 400,
    "timestep_bias_multiplier": 1000.0,
    "worst_ratio_bound": 8.0,  # without one, a learning rate three times too high undoes the model
}
FLAGS: flags.Groups = {
    **run_flags.RUN_FLAGS,
    **{
        title: flags.with_preset(group, "efficient", EFFICIENT, run_flags.PRESET.choices)
        for title, group in (
            ("method", run_flags.TRAJECTORY), ("noise and timesteps", run_flags.NOISING),
            ("prompts and generation", GENERATION), ("preference", PREFERENCE),
        )
    },
    "reward": REWARD_FLAGS, "selection": run_flags.SELECTION,
}  # fmt: skip
MOVED = {
    "train_on": "best is baselines/best_of_n.py, policy is baselines/ddpo.py, pair is what this script does",
    "generate_with": "pairs of the base, drawn once, are baselines/diffusion_dpo.py",
    "reference_sets": "pairs of the base, drawn once, are baselines/diffusion_dpo.py with --sets",
}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The resolved flags of a run.

    Raises:
        UserError: naming the flag and the remedy.
    """
    flags.refuse_moved(argv, MOVED)
    args = run_flags.parse_run(__doc__.splitlines()[0], FLAGS, argv)
    check_reward_flags(vars(args))
    n = args.num_noisy_latents
    require(n >= 2, f"--num_noisy_latents is {n}, but a preference needs 2 branches or more; raise it")
    needs = f"reward_on={args.reward_on}" if args.reward_on == "sample" else f"branch_noise={args.branch_noise}"
    require(
        args.latents_per_prompt == "n" or needs == "branch_noise=fresh",
        f"--{needs} needs branches that start from different latents; add --latents_per_prompt=n",
    )
    return args


def one_forward_trains(args: argparse.Namespace) -> bool:
    """Whether the forward that gives the gradient also gives the errors that the loss weighs: where the graph goes
    through the sampler, or samples are judged and the states of a pair fit one slice."""
    a_pair_fits = 2 * args.trajectory_nums <= args.train_rows
    return args.backprop_through_sampler or (args.reward_on == "sample" and a_pair_fits)


def rows_per_step(args: argparse.Namespace) -> dict[str, float]:
    """Rows that one process puts through the UNet in an optimizer step, by purpose, and through the decoder.

    With P prompts, n branches of m steps, L latents per prompt of T sampling steps that serve k updates, and 2 rows
    where guidance is used: P L T / k to generate; P n m to score or, if samples are judged, 2 P m to walk the pairs,
    2 P (m - 1) where the last output comes with its gradient; 2 P m for the reference, or 2 P on first steps only;
    2 P m to train. Branches that end early, below t = 0, cost less.
    """
    prompts = args.train_batch_size * args.gradient_accumulation_steps
    n, m = args.num_noisy_latents, args.trajectory_nums
    latents = prompts * (n if args.latents_per_prompt == "n" else 1) / args.generation_reuse
    guided = run_flags.guided_rows(args.branch_guidance_scale)
    along_branches = args.reward_on == "trajectory"
    return {
        "generate": latents * args.infer_steps * run_flags.guided_rows(args.guidance_scale),
        "score": prompts * (n * m if along_branches else 2 * (m - 1 if one_forward_trains(args) else m)) * guided,
        "reference": 2 * prompts * (m if args.reference_steps == "all" else 1),
        "train": 2 * prompts * m * (guided if args.backprop_through_sampler else 1),
        "decode": prompts * n * m if along_branches else latents,
    }


def preference_loss(
    args: argparse.Namespace,
    errors: Tensor,
    reference_errors: Tensor,
    active: Tensor,
    rewards: Tensor,
    decided: Tensor,
) -> Preference:
    """Equation 11: `-log sigmoid(beta (r_best - r_worst) - scale (R_best - R_worst))` for B pairs.

    `r = -(e_theta - e_ref)` is Diffusion-DPO's surrogate of the log ratio (Wallace et al., arXiv 2311.12908, eq. 14),
    e the squared error, a mean over elements and over the active steps of a branch. beta multiplies it as it is: 2500
    here are what `beta_dpo=5000` is in Diffusion-DPO's code, which halves it. R is the mean reward over active steps.
    `--worst_ratio_bound` clamps `beta r_worst` from below. Both likelihoods fall in training, that of the worse branch
    faster, and where nothing stops it the model leaves both behind.

    Shapes: errors, active (B, 2, m), best branch first; reference_errors (B, 2, m), or (B, 2, 1) for the first step
    only; rewards (B, 2); decided (B,) bool: the pair has two scores that differ. The mean loss, whose derivative
    `weights` is, counts an undecided pair as 0 and divides by B.
    """
    import torch
    from torch.nn.functional import logsigmoid

    from sharpening.regression import Preference, masked_mean

    reference = masked_mean(reference_errors, active[..., : reference_errors.shape[-1]])
    log_ratios = -(masked_mean(errors, active) - reference)
    margin = args.reward_margin_scale * torch.where(decided, rewards[:, 0] - rewards[:, 1], 0)
    lowest = -args.worst_ratio_bound / args.beta_dpo
    logits = args.beta_dpo * (log_ratios[:, 0] - log_ratios[:, 1].clamp(min=lowest))
    if args.reward_margin == "inside":
        logits = logits - margin
    loss = -logsigmoid(logits)
    if args.reward_margin == "outside":
        loss = loss + margin
    slope = args.beta_dpo * torch.sigmoid(-logits)  # (B,)
    share = active.to(slope.dtype) / active.sum(-1, keepdim=True)  # (B, 2, m)
    slopes = torch.stack([slope, -slope * (log_ratios[:, 1] > lowest)], 1)  # (B, 2)
    weights = (slopes * decided[:, None] / len(decided))[..., None] * share
    return Preference(loss, logits, log_ratios, weights)


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
    plan = Plan(args, FLAGS, Method("RLHF Diffusion-Sharpening", "diffusion-sharpening", "2502.12146"))
    schedule, accelerator, device = plan.schedule, plan.accelerator, plan.device
    prompt_data = load_prompts(prompts_file=args.prompts_file, **plan.data_options())
    n, m = args.num_noisy_latents, args.trajectory_nums
    prompts_per_step = args.train_batch_size * args.gradient_accumulation_steps
    latents_per_prompt = n if args.latents_per_prompt == "n" else 1
    reuse, guidance = args.generation_reuse, args.branch_guidance_scale
    facts = {"preset": f"{args.preset} (n = {n} branches, m = {m} steps of {args.infer_steps} per trajectory)"}
    if args.preset == "paper" and args.reward_on == "trajectory":
        facts["note"] = "judged along branches, this lost reward in docs/study.md; --preset=efficient gained"
    plan.settle(
        len(prompt_data.dataset), prompt_data.description, rows_per_step(args), facts, reuse, frozen=not args.use_lora
    )
    if args.dry_run:
        return 0

    import torch

    from sharpening import sdxl
    from sharpening.data.encoding_cache import cache_embeddings
    from sharpening.draws import draw_noise
    from sharpening.generation import Generation, generate_in_slices
    from sharpening.regression import Regression
    from sharpening.run import Run
    from sharpening.running.curves import Means, add_divergence, add_preference, add_rewards
    from sharpening.running.reward_scaling import RewardScaling
    from sharpening.selection import begin_samples, score_branches, select
    from sharpening.trajectory import Branches, outputs_through_sampler, walk_path
    from sharpening.transfer import slices, upload

    run = Run(plan)
    reward = load_reward(args.reward_model, device, processes=plan.world_size, **reward_options(vars(args)))
    run.start_trackers()

    # ----------------------------------------------------------------------------------------- MODELS AND DATA
    vae, reward_decoder = run.models.decoders()
    unet = run.models.unet()
    reference = run.models.reference(unet)
    parameters = sdxl.trainable_parameters(unet)
    optimizer, lr_scheduler, ema = run.make_optimizer(unet)
    generation = Generation()
    scaling = RewardScaling(args.reward_scaling, reward.components, plan.hosts)
    model, optimizer = run.prepare(unet, optimizer, lr_scheduler, ema, generation.made, scaling.kept)
    regression = Regression(schedule, args.branch_target, args.snr_gamma)

    encoders, unconditional = run.models.text_encoders()
    run.validate_with(encoders, unconditional, vae, reward)
    data = cache_embeddings(prompt_data.dataset, encode_prompts=encoders.encode, **run.cache_options())
    del encoders
    batches, draws = run.batches(data, reuse), run.draws()
    shape = sdxl.latent_shape(vae, args.resolution)
    time_ids = sdxl.default_time_ids(prompts_per_step, args.resolution, device)

    # ------------------------------------------------------------------------------------------------ TRAINING
    means = Means(device)
    for step in run.steps(unet):
        # -------------------------------------------------------------------------------------------- GENERATE
        use = (step - 1) % reuse
        if use == 0 or not generation.batch:
            fits = generation.begin(next(batches), (prompts_per_step * latents_per_prompt, *shape))
            # A checkpoint's latents serve the prompts that they were made for, on all processes or on none.
            if run.any_rank(use == 0 or not fits):
                generation.made.clear()
        batch, prompts = generation.batch, generation.batch["caption"]  # all P of the step, however accumulated
        condition = sdxl.Condition.of({**batch, "time_ids": time_ids}, device)
        unet.eval()
        noise = draw_noise(args.seed, batch["draw"].tolist(), latents_per_prompt, shape).flatten(0, 1)
        noise = upload(noise, device)
        # One autocast around a whole pass: it converts the weights once, and forgets them before a gradient is taken.
        if not generation.made:
            drawing = sdxl.Denoiser(unet, condition.repeat(latents_per_prompt), unconditional, args.guidance_scale)
            with run.phase("generation"), accelerator.autocast():
                generation.keep(generate_in_slices(drawing.rows, schedule, noise, args.generation_batch_size))

        # ---------------------------------------------------------------------------------------------- SAMPLE
        x_0 = upload(generation.latents, device)  # (P * latents_per_prompt, 4, h, w)
        x_0 = x_0.repeat_interleave(n // latents_per_prompt, 0)  # (P * n, 4, h, w)
        noising = draws.noising(batch["draw"] * reuse + use, 1 if args.branch_noise == "shared" else n, shape)
        eps = noising.eps.expand(-1, n, -1, -1, -1).flatten(0, 1)
        eps = noise if args.branch_noise == "generation" else upload(eps, device)
        # Rows b * n + i are branch i of prompt b; all branches of a prompt share t.
        branches = Branches.begin(schedule, x_0, eps, noising.t.repeat_interleave(n))  # P * n of them
        condition = condition.without_prompt(unconditional, noising.dropped)

        # ----------------------------------------------------------------------------------------------- SCORE
        def judge(latents: Tensor, rows: list[int], prompts: list[str] = prompts) -> Callable[[], tuple]:
            decoded = sdxl.decode_latents(reward_decoder, latents, args.decode_batch_size)
            return reward.begin(decoded, [prompts[row // n] for row in rows])

        with run.together(step, x_0), accelerator.autocast():
            if args.reward_on == "trajectory":
                walking = sdxl.Denoiser(unet, condition.repeat(n), unconditional, guidance)
                scores, path = score_branches(
                    walking.rows, judge, schedule, branches, m, args.score_batch_size, run.same_forwards
                )
            else:
                generation.scores = generation.scores or begin_samples(judge, x_0, args.score_batch_size)()
                scores = generation.scores

        # ---------------------------------------------------------------------------------------------- SELECT
        scores = scaling.apply(scores, n, means)
        selection = select(scores.rewards, scores.active, n)
        decided = selection.decided  # (P,) the others carry no preference
        rows = torch.stack([selection.best_rows, selection.worst_rows], 1).flatten()  # (2 P,): best, worst, ...
        rewards = selection.branch_reward.flatten()[rows].view(-1, 2)  # (P, 2)
        t = noising.t if args.reward_on == "trajectory" else None
        add_rewards(means, scores, selection, t, schedule.num_train_timesteps)

        # --------------------------------------------------------------------------------------------- COMPARE
        pairs, of_pairs, at_once = branches.rows(rows), condition.repeat(2), one_forward_trains(args)
        if args.reward_on == "trajectory":
            path = path.rows(rows)
        else:
            walking = sdxl.Denoiser(unet, of_pairs, unconditional, guidance)
            with run.phase("score"), accelerator.autocast():
                path = walk_path(walking.rows, schedule, pairs, m, args.score_batch_size, outputs=not at_once)
        measured = path if args.reference_steps == "all" else path.first(1)
        with torch.no_grad(), run.phase("reference"), reference.unet() as frozen, accelerator.autocast():
            reference_output = sdxl.predict_along(frozen, measured, of_pairs, args.train_rows)
        reference_errors = regression.errors(pairs, measured, reference_output)  # (2 P, m)
        unet.train()

        # Whole pairs at a time where a forward has still to give their errors, all of them where it has not.
        pairs_at_a_time = max(1, args.train_rows // (2 * m)) if at_once else prompts_per_step
        parts = [slice(2 * some.start, 2 * some.stop) for some in slices(prompts_per_step, pairs_at_a_time)]
        for part in parts:
            some, of_some, of_part = pairs.rows(part), path.rows(part), slice(part.start // 2, part.stop // 2)
            with run.exchange(model, part is parts[-1]) if at_once else torch.no_grad():
                if args.backprop_through_sampler:
                    walking = sdxl.Denoiser(model, of_pairs, unconditional, guidance)
                    output = outputs_through_sampler(walking.rows(part), schedule, some, m)
                elif of_some.output is None:
                    output = sdxl.predict_along(model, of_some, of_pairs.rows(part))
                else:
                    output = of_some.output  # (2 p, m, 4, h, w)
                errors = regression.errors(some, of_some, output)  # (2 p, m)
                of_pair = (errors.detach(), reference_errors[part], upload(of_some.active, device))
                preference = preference_loss(
                    args, *(each.unflatten(0, (-1, 2)) for each in of_pair), upload(rewards[of_part], device),
                    upload(decided[of_part], device),
                )  # fmt: skip
                weights = preference.weights.flatten(0, 1) * (len(some.t) / len(pairs.t))  # (2 p, m), of all pairs
                if at_once:
                    accelerator.backward((weights * errors).sum())
            add_preference(means, preference, rewards[of_part], decided[of_part])
            if args.worst_ratio_bound < math.inf:
                beyond = args.beta_dpo * preference.log_ratios[:, 1] <= -args.worst_ratio_bound
                means.add("preference/bounded", beyond, decided[of_part])
            add_divergence(means, output.detach(), reference_output[part], measured.active[part])

        # ----------------------------------------------------------------------------------------------- TRAIN
        if not at_once:
            parts = regression.rows(pairs, path, of_pairs, weights).split(args.train_rows, run.same_forwards)
            for part in parts:
                with run.exchange(model, part is parts[-1]):
                    accelerator.backward(part.loss(sdxl.predict_output(model, part.x, part.t, part.condition)))

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
        if use == reuse - 1:
            generation.made.clear()  # they have served; a checkpoint need not hold them
        metrics |= run.speed("generation")
        run.log_branches(step, prompts, scores.last_estimate, scores, t, best=rows[::2], worst=rows[1::2])
        run.end_step(step, metrics, unet, ema)

    # ---------------------------------------------------------------------------------------------------- SAVE
    run.finish(unet, ema)
    return 0


def cli(argv: Sequence[str]) -> int:
    """`main` on a command line; a `UserError` becomes one sentence on stderr and status 2."""
    return exit_status(lambda: main(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
