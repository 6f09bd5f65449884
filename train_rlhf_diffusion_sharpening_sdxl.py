"""RLHF Diffusion-Sharpening of SDXL (Tian et al., arXiv 2502.12146, algorithm 2): prompts in, preference pairs online.

For every prompt:
    GENERATE  clean latents with the current model, by DDIM, without gradient.
    SAMPLE    n noises and one timestep t; noise the latents n ways.
    SCORE     walk m sampling steps from each of the n branches without gradient; reward the clean estimate of each
              step or, with --reward_on=sample, the generated latents themselves.
    SELECT    the branches with the largest and the smallest summed reward (eq. 8), prompt by prompt.
    COMPARE   the model's errors with those of a frozen reference along both branches: the preference loss (eq. 11).
    TRAIN     walk the pair again; what the loss asks of the error of each step is known by now.
States along a branch are data and the loss sees the model through its errors alone, so its gradient is a sum over
steps with known weights: each step is backpropagated on its own, and peak memory grows neither with n nor with m.

    accelerate launch train_rlhf_diffusion_sharpening_sdxl.py --pretrained_model_name_or_path=MODEL \
        --prompts_file=prompts.txt --reward_model=clip --resolution=512 --train_batch_size=1 --mixed_precision=fp16
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from sharpening import arguments
from sharpening.arguments import parse, require, require_at_least_1, shared_parser, validate_schedule
from sharpening.errors import exit_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from sharpening.trajectory import Guide, Predict, Preference, Schedule, Scores, Transition

PRESETS = {
    "paper": {
        **arguments.PRESETS["paper"],
        "guidance_scale": 5.0,
        "latents_per_prompt": "1",
        "branch_noise": "fresh",
        "reward_margin": "inside",
        "reference_steps": "all",
    },
    "released": {
        **arguments.PRESETS["released"],
        "guidance_scale": 1.0,
        "latents_per_prompt": "n",
        "branch_noise": "generation",
        "reward_margin": "outside",
        "reference_steps": "first",
    },
}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The resolved flags of a run.

    Raises:
        UserError: naming the flag and the remedy.
    """
    parser = shared_parser(__doc__.splitlines()[0])
    parser.set_defaults(method="RLHF")
    g = parser.add_argument_group("prompts and generation (RLHF)")
    g.add_argument("--prompts_file", help="txt with a prompt on each line, csv or jsonl; no images are needed")
    g.add_argument("--guidance_scale", type=float, help="guidance when generating; unset: 5, preset released: 1")
    g.add_argument("--latents_per_prompt", choices=["1", "n"], help="latents to branch from; unset: 1, released: n")
    g.add_argument(
        "--generate_with",
        choices=["current", "reference"],
        default="current",
        help="the model as it is, or as it was: a prompt then always has the same latents, a fixed data set of pairs "
        "as in Diffusion-DPO",
    )
    g.add_argument(
        "--reference_sets",
        type=int,
        default=1,
        help="with --generate_with=reference: sets of latents per prompt, each drawn once, then kept in memory",
    )
    g.add_argument(
        "--generation_batch_size",
        type=int,
        default=8,
        help="latents per forward when generating, two rows each with guidance",
    )
    g.add_argument("--generation_reuse", type=int, default=1, help="optimizer steps that one generation serves")
    g.add_argument(
        "--branch_noise",
        choices=["fresh", "generation"],
        help="of the branches: noise of their own (paper), or that which their latents came from (released)",
    )
    g = parser.add_argument_group("preference (RLHF)")
    g.add_argument(
        "--reward_on",
        choices=["trajectory", "sample"],
        default="trajectory",
        help="what is judged: the clean estimates along a branch (paper), or the generated latent it starts from",
    )
    g.add_argument(
        "--share_noise_in_pair",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="noise all latents of a prompt alike, as Diffusion-DPO does",
    )
    g.add_argument(
        "--train_on",
        choices=["pair", "best", "policy"],
        default="pair",
        help="the preference loss; or plain regression on the best branch alone, best-of-n fine-tuning on own "
        "samples; or a policy gradient on m steps of every sample's own stochastic path, as DDPO has it",
    )
    g.add_argument("--beta_dpo", type=float, default=2500, help="beta of eq. 11, without DPO's factor 1/2")
    g.add_argument("--reward_margin_scale", type=float, default=1.0, help="scale of the reward margin; 0: without")
    g.add_argument(
        "--reward_margin",
        choices=["inside", "outside"],
        help="inside the log-sigmoid (eq. 11) or added to the loss, where it has no gradient (released code)",
    )
    g.add_argument(
        "--reference_steps",
        choices=["all", "first"],
        help="steps of a branch on which the reference is measured; the model is on all of them",
    )
    args = parse(parser, argv, PRESETS)
    n = args.num_noisy_latents
    require(n >= 2, f"--num_noisy_latents is {n}, but a preference needs 2 branches or more; raise it")
    require_at_least_1(args, "generation_batch_size", "generation_reuse", "reference_sets")
    for name in ("guidance_scale", "reward_margin_scale"):
        require(getattr(args, name) >= 0, f"--{name} is {getattr(args, name)}, but it must not be negative")
    require(args.beta_dpo > 0, f"--beta_dpo is {args.beta_dpo}, but it must be above 0")
    require(
        args.reference_sets == 1 or args.generate_with == "reference",
        "--reference_sets are of the reference's latents; add --generate_with=reference",
    )
    if args.train_on == "policy":
        own_samples = args.reward_on == "sample" and args.generate_with == "current" and args.generation_reuse == 1
        require(
            own_samples
            and args.guidance_scale == args.branch_guidance_scale == 1
            and not args.proportion_empty_prompts,
            "--train_on=policy judges samples that the model has just drawn from their prompts without guidance; add "
            "--reward_on=sample --latents_per_prompt=n --guidance_scale=1, and no --generate_with, "
            "--generation_reuse, --branch_guidance_scale or --proportion_empty_prompts",
        )
        unheeded = {
            "share_noise_in_pair": args.share_noise_in_pair,
            "branch_noise=generation": args.branch_noise == "generation",
            "branch_target=consistent": args.branch_target == "consistent",
            "snr_gamma": args.snr_gamma is not None,
            "timestep_bias_strategy": args.timestep_bias_strategy != "none",
            "backprop_through_sampler": args.backprop_through_sampler,
        }
        for flag, on in unheeded.items():
            require(not on, f"--{flag} says nothing to --train_on=policy, which noises nothing; leave it out")
        require(
            args.trajectory_nums < args.infer_steps,
            f"--trajectory_nums is {args.trajectory_nums}, but --train_on=policy takes its steps from the first "
            f"{args.infer_steps - 1} of --infer_steps={args.infer_steps}; lower it",
        )
    reuse_noise = args.branch_noise == "generation"
    needs_latents = {
        "share_noise_in_pair": args.share_noise_in_pair,
        "reward_on=sample": args.reward_on == "sample",
        "branch_noise=generation": reuse_noise,
    }
    for flag, on in needs_latents.items():
        require(
            args.latents_per_prompt == "n" or not on,
            f"--{flag} needs branches that start from different latents; add --latents_per_prompt=n",
        )
    require(
        not (reuse_noise and args.share_noise_in_pair),
        "--share_noise_in_pair and --branch_noise=generation exclude each other; leave one of them out",
    )
    return args


def rows_per_step(args: argparse.Namespace) -> dict[str, float]:
    """Rows that one process puts through the UNet in an optimizer step, by purpose, and through the decoder.

    With P prompts, n branches of m steps, L latents per prompt of T sampling steps that serve k updates, and 2 rows
    where guidance is used: P L T / k to generate; P n m to score, or 2 P m if samples are judged; 2 P m for the
    reference, or 2 P on first steps only; 2 P m to train, or P m on the best alone. Branches that end early, below
    t = 0, cost less. A policy gradient is P L T to generate and P n m to train. A frozen reference generates and
    judges samples no more when it has drawn its sets.
    """
    prompts = args.train_batch_size * args.gradient_accumulation_steps
    n, m = args.num_noisy_latents, args.trajectory_nums
    latents = prompts * (n if args.latents_per_prompt == "n" else 1) / args.generation_reuse
    guided = 1 if args.branch_guidance_scale == 1 else 2
    judge_branches = args.reward_on == "trajectory"
    if args.train_on == "policy":
        return {"generate": latents * args.infer_steps, "train": prompts * n * m, "decode": latents}
    return {
        "generate": latents * args.infer_steps * (1 if args.guidance_scale == 1 else 2),
        "score": prompts * (n if judge_branches else 2) * m * guided,
        "reference": 2 * prompts * (m if args.reference_steps == "all" else 1),
        "train": (2 if args.train_on == "pair" else 1) * prompts * m * guided,
        "decode": prompts * n * m if judge_branches else latents,
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

    Shapes: errors, active (B, 2, m), best branch first; reference_errors (B, 2, m), or (B, 2, 1) for the first step
    only; rewards (B, 2); decided (B,) bool: the pair has two scores that differ. The mean loss, whose derivative
    `weights` is, counts an undecided pair as 0 and divides by B. With `--train_on best` the loss is the best branch's
    error.
    """
    import torch
    from torch.nn.functional import logsigmoid

    from sharpening.trajectory import Preference, masked_mean

    reference = masked_mean(reference_errors, active[..., : reference_errors.shape[-1]])
    log_ratios = -(masked_mean(errors, active) - reference)
    margin = args.reward_margin_scale * torch.where(decided, rewards[:, 0] - rewards[:, 1], 0)
    logits = args.beta_dpo * (log_ratios[:, 0] - log_ratios[:, 1])
    if args.reward_margin == "inside":
        logits = logits - margin
    loss = -logsigmoid(logits)
    if args.reward_margin == "outside":
        loss = loss + margin
    slope = args.beta_dpo * torch.sigmoid(-logits)  # (B,)
    slopes = torch.stack([slope, -slope], 1)  # (B, 2)
    if args.train_on == "best":
        loss = masked_mean(errors, active)[:, 0]
        slopes = torch.tensor([1.0, 0.0]).to(slope).expand(len(slope), 2)
    share = active.to(slope.dtype) / active.sum(-1, keepdim=True)  # (B, 2, m)
    weights = (slopes * decided[:, None] / len(decided))[..., None] * share
    return Preference(loss, logits, log_ratios, weights)


def rlhf_losses(
    args: argparse.Namespace,
    predict: Predict,
    guide: Guide | None,
    schedule: Schedule,
    x_t: Tensor,
    t: Tensor,
    x_0: Tensor,
    eps: Tensor,
    weights: Tensor,
) -> Iterator[Tensor]:
    """The pairs' branches step by step: yields m scalars whose summed gradient is that of the mean preference loss.

    Shapes: x_t, x_0, eps (R, 4, h, w), the start, latent and noise of each branch; t (R,) where it starts; weights
    (R, m) of `preference_loss`, taken at the same parameters.
    """
    from sharpening.trajectory import weighted_errors

    detach, target = not args.backprop_through_sampler, (args.branch_target, args.snr_gamma)
    yield from weighted_errors(predict, schedule, x_t, t, x_0, eps, weights, guide, detach, *target)


def policy_losses(
    model: Callable[[Tensor], tuple[Predict, Guide | None]],
    schedule: Schedule,
    path: Sequence[Transition],
    advantage: Tensor,
    batch_size: int,
) -> Iterator[Tensor]:
    """DDPO's objective `-A log p_theta(x_(t-1) | x_t, c)` (Black et al., arXiv 2305.13301, eq. 4), a mean over R
    samples and m of their steps: yields scalars, for m steps of `batch_size` samples at a time, whose sum is the loss
    up to a constant.

    The samples are of the model itself and serve one update, so the ratio of DDPO's importance sampling is 1 and its
    clipping idle. `model(rows)` gives the callables of `walk` for some samples; path are the m transitions of
    `sample_path`; advantage (R,).
    """
    import torch

    from sharpening.trajectory import Transition, weighted_errors

    for rows in torch.arange(len(advantage)).split(batch_size):
        predict, _ = model(rows)
        for transition in path:
            x, t, x_0, eps, precision = Transition(*(part[rows] for part in transition))
            weights = advantage[rows] * precision / (len(path) * len(advantage))
            yield from weighted_errors(
                predict, schedule, x, t, x_0, eps, weights[:, None], guide=None, detach=True, kind="noise",
                snr_gamma=None,
            )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Train; returns the exit status: 0 finished, 1 stopped by a failing reward or loss, 128 + n by signal n."""
    # Imported here, so that --help and a mistyped flag are answered before seconds of imports, --dry_run before those
    # of diffusers' models.
    import math
    import time
    from contextlib import nullcontext
    from pathlib import Path

    from sharpening import model_source
    from sharpening.data.prompts import load_prompts
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
    require(
        args.train_on != "policy" or bool((schedule.alphas_cumprod[schedule.timesteps] > 0).all()),
        "--train_on=policy cannot take a step from pure noise, where the scheduler's sampling starts; use a scheduler "
        "without rescale_betas_zero_snr",
    )
    prompt_data = load_prompts(
        prompts_file=args.prompts_file,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        caption_column=args.caption_column,
        max_train_samples=args.max_train_samples,
        seed=args.seed or 0,
        cache_dir=args.cache_dir,
    )

    n, m, batch_size = args.num_noisy_latents, args.trajectory_nums, args.train_batch_size
    latents_per_prompt = n if args.latents_per_prompt == "n" else 1
    accumulation, reuse = args.gradient_accumulation_steps, args.generation_reuse
    steps_per_epoch = math.ceil(len(prompt_data.dataset) / (batch_size * accumulation * world_size)) * reuse
    num_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    # With LoRA the reference is the UNet without its adapter; a policy gradient knows no reference.
    frozen_copy = not (args.use_lora or args.train_on == "policy")
    if is_main:
        cost = rows_per_step(args)
        plan = launching.describe(
            args, source, accelerator, prompt_data.description, cost, steps_per_epoch, num_steps, frozen_copy
        )
        print(plan, flush=True)
    if args.dry_run:
        return 0

    import torch
    from diffusers.optimization import get_scheduler
    from torch.utils.data import DataLoader

    from reward import load_reward
    from sharpening import draws, run, sdxl
    from sharpening.data.encoding_cache import cache_embeddings, collate
    from sharpening.rewards.calling import RewardError
    from sharpening.running import checkpoints, publishing, tracking
    from sharpening.running.validation import Validation, averaged_weights
    from sharpening.trajectory import (
        Transition,
        advantages,
        begin_samples,
        branch_error,
        generate,
        join_scores,
        sample_path,
        score_branches,
        select,
        squared_error,
        walk,
    )
    from sharpening.waiting import beginning, wait_for_all

    run.quiet_libraries()
    checkpoint = checkpoints.prepare_output(accelerator, args)
    start_step, run_id = checkpoints.resolve_run(accelerator, args, checkpoint)
    reward = load_reward(args.reward_model, device, **run.reward_options(args, world_size))
    run.start_trackers(accelerator, args, run_id)

    # -------------------------------------------------------------------------------------------------- MODELS
    vae = sdxl.load_vae(args, source, device, weight_dtype)
    reward_decoder = sdxl.load_reward_decoder(args, device, weight_dtype) if args.reward_vae else vae
    unet = sdxl.load_unet(args, source, device, weight_dtype)
    frozen = sdxl.load_frozen_unet(args, source, device, weight_dtype) if frozen_copy else None
    parameters = sdxl.trainable_parameters(unet)
    ema = run.make_ema(unet, parameters, args, device) if args.use_ema else None
    optimizer = run.make_optimizer(parameters, args, world_size, scaled=accelerator.scaler is not None)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=num_steps
    )
    model, optimizer = accelerator.prepare(unet, optimizer)
    generated: list[dict] = []  # prompts and latents of each micro-batch, for as many updates as they serve
    of_reference: dict[str, Tensor] = {}  # what the reference made, by prompt and set
    reference_scores: dict[str, Scores] = {}  # and what it earned, if samples are judged
    checkpoints.register_checkpointing(accelerator, unet, ema, lr_scheduler, generated)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))

    # ---------------------------------------------------------------------------------------------------- DATA
    encoders = sdxl.TextEncoders.load(source, device, weight_dtype)
    unconditional = sdxl.unconditional_embedding(source, encoders)
    validation = Validation(args, encoders, unconditional)
    cached = cache_embeddings(
        prompt_data.dataset,
        encode_prompts=encoders.encode,
        batch_size=args.decode_batch_size,
        key={"text": model_source.text_identity(source)},
        seed=args.seed,
        cache_dir=args.cache_dir,
        dtype=weight_dtype,
    )
    del encoders
    # Draws are counted in generations: generation g serves the optimizer steps g * reuse + 1 to (g + 1) * reuse.
    sampler = draws.DrawSampler(
        len(cached), batch_size, accelerator.process_index, world_size, accumulation, args.seed,
        start_step // reuse, math.ceil(num_steps / reuse),
    )  # fmt: skip
    workers = {"num_workers": args.dataloader_num_workers, "pin_memory": device.type == "cuda"}
    batches = iter(DataLoader(cached, batch_sampler=sampler, collate_fn=collate, **workers))
    probabilities = draws.timestep_probabilities(args, schedule.num_train_timesteps)  # (T,)
    latent_shape = sdxl.latent_shape(vae, args.resolution)
    time_ids = sdxl.default_time_ids(batch_size, args.resolution, device)

    # ------------------------------------------------------------------------------------------------ TRAINING
    stop = run.StopSignal()
    means = tracking.Means(device)
    log = tracking.StepLog(accelerator, args, parameters, start_step, num_steps)
    step, metrics, prompt_batches, sample_scores = start_step, {}, [], []
    for step in range(start_step + 1, num_steps + 1):
        started, generation_seconds, failure = time.perf_counter(), 0.0, ""
        use = (step - 1) % reuse
        if use == 0 or not prompt_batches:
            prompt_batches, sample_scores = [next(batches) for _ in range(accumulation)], []
            # A checkpoint's latents serve the prompts that they were made for, on all processes or on none.
            shape = (batch_size * latents_per_prompt, *latent_shape)
            kept = [(entry["prompts"], tuple(entry["latents"].shape)) for entry in generated]
            fits = kept == [(batch["caption"], shape) for batch in prompt_batches]
            if run.any_rank(accelerator, use == 0 or not fits):
                generated.clear()
        for micro_batch, batch in enumerate(prompt_batches):
            # ---------------------------------------------------------------------------------------- GENERATE
            prompts = batch["caption"]
            condition = sdxl.Condition.of({**batch, "time_ids": time_ids}, device)
            unet.eval()
            # What the current model makes is new at every draw; what the reference makes, one of a prompt's sets.
            as_now = args.generate_with == "current"
            keys = batch["draw"].tolist()
            if not as_now:
                sets = [draw // len(cached) % args.reference_sets for draw in keys]
                keys = [f"{index}/{prompt}" for index, prompt in zip(sets, prompts, strict=True)]
            noise = draws.draw_noise(args, keys, latents_per_prompt, latent_shape).flatten(0, 1).to(device)
            if len(generated) == micro_batch:
                generation_started, latents, paths = time.perf_counter(), torch.zeros_like(noise), []
                slices = torch.arange(len(noise)).split(args.generation_batch_size)
                if not as_now:
                    # What is kept is made by itself: neighbours in the batch would leave their rounding in it.
                    by_prompt = zip(keys, torch.arange(len(noise)).split(latents_per_prompt), strict=True)
                    missing = [rows for key, rows in by_prompt if key not in of_reference]
                    slices = [part for rows in missing for part in rows.split(args.generation_batch_size)]
                if args.train_on == "policy":
                    path_noise, kept = draws.draw_path(args, keys, n, latent_shape, args.infer_steps, m)
                    path_noise, kept = path_noise.flatten(0, 1).to(device), kept.flatten(0, 1)
                sampled = nullcontext(unet) if as_now else sdxl.reference_unet(unet, frozen)
                with torch.no_grad(), sampled as sampler_unet, accelerator.autocast():
                    for rows in slices:
                        of_rows = condition.rows(rows // latents_per_prompt)
                        predict, guide = sdxl.branch_model(sampler_unet, of_rows, unconditional, args.guidance_scale)
                        if args.train_on == "policy":
                            path = sample_path(predict, schedule, noise[rows], path_noise[rows], kept[rows])
                            latents[rows] = path[0]
                            paths.append(path[1])
                        else:
                            latents[rows] = generate(predict, schedule, noise[rows], guide)
                if not as_now:
                    for key, made in zip(keys, latents.cpu().split(latents_per_prompt), strict=True):
                        of_reference.setdefault(key, made.clone())
                    latents = torch.cat([of_reference[key] for key in keys]).to(device)
                generated.append({"prompts": prompts, "latents": latents})
                broken = not generated[-1]["latents"].isfinite().all()
                generation_seconds += time.perf_counter() - generation_started
                if run.any_rank(accelerator, broken):
                    message = (
                        f"step {step}: the generated latents are not finite; use --mixed_precision=bf16, or a lower "
                        "--learning_rate if earlier steps were well"
                    )
                    return run.fail(accelerator, args, step - 1, run_id, message)

            # ------------------------------------------------------------------------------------------ SAMPLE
            x_0 = generated[micro_batch]["latents"].to(device)  # (B * latents_per_prompt, 4, h, w)
            x_0 = x_0.repeat_interleave(n // latents_per_prompt, 0)  # (B * n, 4, h, w)
            noises = 1 if args.share_noise_in_pair else n
            sample = draws.draw_branches(args, batch["draw"] * reuse + use, noises, latent_shape, probabilities)
            eps = sample.eps.expand(-1, n, -1, -1, -1).flatten(0, 1).to(device)
            eps = noise if args.branch_noise == "generation" else eps
            t = sample.t.to(device).repeat_interleave(n)  # (B * n,)
            condition = condition.without_prompt(unconditional, sample.dropped)
            # Rows b * n + i are branch i of prompt b; all branches of a prompt share t.
            x_t = schedule.add_noise(x_0, eps, t)

            # ------------------------------------------------------------------------------------------- SCORE
            def model_of(rows: Tensor, condition: sdxl.Condition = condition) -> tuple:
                return sdxl.branch_model(unet, condition.rows(rows // n), unconditional, args.branch_guidance_scale)

            def judge(latents: Tensor, rows: Tensor, prompts: list[str] = prompts) -> Callable[[], tuple]:
                decoded = sdxl.decode_latents(reward_decoder, latents, args.decode_batch_size)
                return reward.begin(decoded, [prompts[row // n] for row in rows])

            try:
                if args.reward_on == "trajectory":
                    scores = score_branches(
                        model_of, judge, schedule, x_t, t, m, args.score_batch_size, keep_path=True
                    )
                elif as_now:
                    if len(sample_scores) == micro_batch:
                        samples = torch.arange(len(x_0))
                        sample_scores.append(begin_samples(judge, x_0, samples, args.score_batch_size)())
                    scores = sample_scores[micro_batch]
                else:
                    # What is kept is judged once and as it was made, by itself; what has no score yet, again.
                    begun = {}
                    with beginning(begun.values()):
                        for key, samples in zip(keys, torch.arange(len(x_0)).split(n), strict=True):
                            if key not in reference_scores or reference_scores[key].rewards.isnan().any():
                                begun[key] = begin_samples(judge, x_0, samples, args.score_batch_size)
                    for key, earned in zip(begun, wait_for_all([*begun.values()]), strict=True):
                        reference_scores[key] = earned._replace(last_estimate=torch.empty(0))
                    scores = join_scores([reference_scores[key] for key in keys], x_0)
            except RewardError as error:
                failure = f"step {step}: {error}"
            if run.any_rank(accelerator, bool(failure)):
                return run.fail(accelerator, args, step - 1, run_id, failure or "the reward failed on another process")

            # ------------------------------------------------------------------------------------------ SELECT
            judged = scores.rewards.shape[1]  # m along branches, 1 of samples
            by_prompt = (batch_size, n, judged)
            selection = select(scores.rewards.view(by_prompt), scores.active.view(by_prompt))
            pair = torch.stack([selection.best, selection.worst], 1)  # (B, 2) branches
            rewards = selection.branch_reward.gather(1, pair)  # (B, 2)
            decided = (selection.scored.sum(1) > 1) & ~selection.tied  # (B,) the others carry no preference
            rows = (torch.arange(batch_size)[:, None] * n + pair).flatten()  # (2 B,): best, worst, best, ...

            # ----------------------------------------------------------------------------------------- COMPARE
            if args.train_on == "policy":
                path = [Transition(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*paths, strict=True)]

                def policy_of(rows: Tensor, condition: sdxl.Condition = condition) -> tuple:
                    return sdxl.branch_model(model, condition.rows(rows // n), unconditional, 1.0)

                advantage = advantages(selection).flatten().to(device)  # (B * n,)
                losses = policy_losses(policy_of, schedule, path, advantage, args.score_batch_size)
                backwards = m * math.ceil(len(advantage) / args.score_batch_size)
            else:
                with torch.no_grad():
                    if args.reward_on == "trajectory":
                        path = [point.rows(rows) for point in scores.path]
                    else:
                        predict, guide = model_of(rows)
                        path = [*walk(predict, schedule, x_t[rows], t[rows], m, guide)]
                    of_pairs, target = condition.rows(rows // n), {"x_0": x_0[rows], "eps": eps[rows]}
                    target |= {"kind": args.branch_target, "snr_gamma": args.snr_gamma}
                    reference_errors, divergence = [], []
                    with sdxl.reference_unet(unet, frozen) as reference, accelerator.autocast():
                        for point in path if args.reference_steps == "all" else path[:1]:
                            output = sdxl.predict_output(reference, point.x, point.t, of_pairs)
                            reference_errors.append(branch_error(schedule, point, output, **target))
                            divergence.append(squared_error(output, point.output))
                    errors = [branch_error(schedule, point, point.output, **target) for point in path]
                active = torch.stack([point.active for point in path], 1)  # (2 B, m)
                preference = preference_loss(
                    args,
                    torch.stack(errors, 1).unflatten(0, (-1, 2)),
                    torch.stack(reference_errors, 1).unflatten(0, (-1, 2)),
                    active.unflatten(0, (-1, 2)),
                    rewards.to(device),
                    decided.to(device),
                )
                tracking.add_preference(means, preference, rewards, decided, torch.stack(divergence, 1), active)
                # Regression on the best branch has no use for the worst.
                of_pair = slice(2) if args.train_on == "pair" else slice(1)
                learned, weights = rows.view(-1, 2)[:, of_pair].flatten(), preference.weights[:, of_pair].flatten(0, 1)
                of_learned = condition.rows(learned // n)
                predict, guide = sdxl.branch_model(model, of_learned, unconditional, args.branch_guidance_scale)
                branches = [part[learned] for part in (x_t, t, x_0, eps)]
                losses = rlhf_losses(args, predict, guide, schedule, *branches, weights)
                backwards = m

            # ------------------------------------------------------------------------------------------- TRAIN
            unet.train()
            total = pending = torch.zeros((), device=device)
            for k in range(backwards):
                # Processes exchange gradients once per optimizer step, in its last backward.
                exchange = micro_batch == accumulation - 1 and k == backwards - 1
                with nullcontext() if exchange else accelerator.no_sync(model):
                    pending = pending + next(losses) / accumulation
                    if k == backwards - 1 or not args.backprop_through_sampler:
                        accelerator.backward(pending)
                        total, pending = total + pending.detach(), torch.zeros_like(pending)
            if args.train_on == "policy":
                means.add("loss", total * accumulation)
            tracking.add_rewards(
                means, scores, selection, sample.t if args.reward_on == "trajectory" else None, schedule
            )

        # ------------------------------------------------------------------------------- CLIP, STEP, LOG, SAVE
        metrics = means.reduce(accelerator)
        if not math.isfinite(metrics.get("loss", 0)):  # absent if no pair of the step was decided
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
        if use == reuse - 1:
            generated.clear()  # they have served; a checkpoint need not hold them

        seconds = time.perf_counter() - started
        metrics["samples_per_second"] = batch_size * accumulation * world_size / seconds
        metrics["generation_time_share"] = generation_seconds / seconds
        if is_main and step % args.branch_image_steps == 0:
            shown = {"branches/best": rows[::2], "branches/worst": rows[1::2]}
            shown = {name: scores.last_estimate[which] for name, which in shown.items()}
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
