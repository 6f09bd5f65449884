"""D3PO of SDXL (Yang et al., arXiv 2311.13231): a preference over whole stochastic sampling paths, step by step.

For every prompt:
    SAMPLE   two latents along stochastic paths (DDIM, eta = 1, T steps) from one initial noise, by the model as it is.
    SCORE    reward both; the better image's path is preferred at every step. A tie says nothing.
    TRAIN    -log sigmoid(beta (log rho_best - log rho_worst)) at each step of the two paths,
             rho = p_theta(x_(t-1) | x_t, c) / p_ref(x_(t-1) | x_t, c), clamped to [1 - clip, 1 + clip].
A step is Gaussian with a mean that is linear in the model's output, guided or not, so its log-density, a mean over
elements as in the published code, is a squared error with a known weight. beta and clip are 0.1, so the loss stays
near log 2, and pairs are new in every step: progress shows in the reward. `preference/clamped` says how many ratios
are beyond their bounds and learn no more, `preference/steps_won` at how many steps the better path has gained more.
Left out of the published algorithm: several passes over the same samples, and people who compare them. The last step
of a path is deterministic and not trained on. Of more than two paths the best and the worst are a pair.

    accelerate launch baselines/d3po.py --pretrained_model_name_or_path=MODEL --prompts_file=prompts.txt \
        --reward_model=clip --infer_steps=20 --use_lora --learning_rate=3e-5 --adam_weight_decay=1e-4 --resolution=512
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

PATHS = (
    *run_flags.PROMPTS,
    replace(run_flags.NUM_NOISY_LATENTS, help="n, paths per prompt; the best and the worst make a pair", default=2),
    run_flags.INFER_STEPS,
    run_flags.GUIDANCE_SCALE,
    Flag("beta", "beta of the preference between two paths' steps", float, 0.1, "(0, inf)"),
    Flag("ratio_clip", "how far from 1 a ratio of densities may be before it has no gradient", float, 0.1, "(0, 1)"),
)
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
    n, steps, rows = args.num_noisy_latents, args.infer_steps, 2 * run_flags.guided_rows(args.guidance_scale)
    require(n >= 2, f"--num_noisy_latents is {n}, but a pair needs 2 paths or more; raise it")
    require(steps >= 2, f"--infer_steps is {steps}, but the last step of a path is not trained on; raise it")
    require(args.train_rows >= rows, f"--train_rows is {args.train_rows}, but a pair has {rows} rows; raise it")
    unheeded = "--proportion_empty_prompts says nothing to D3PO, which trains on its own paths; leave it out"
    require(not args.proportion_empty_prompts, unheeded)
    return args


def rows_per_step(args: argparse.Namespace) -> dict[str, float]:
    """Rows that one process puts through the UNet in an optimizer step, by purpose, and through the decoder: with P
    prompts and n samples of T steps, P n T to generate and 2 P (T - 1) each for the reference and to train, all of
    them twice with guidance."""
    prompts = args.train_batch_size * args.gradient_accumulation_steps
    guided = run_flags.guided_rows(args.guidance_scale)
    samples, trained = prompts * args.num_noisy_latents, 2 * prompts * (args.infer_steps - 1) * guided
    generated = samples * args.infer_steps * guided
    return {"generate": generated, "reference": trained, "train": trained, "decode": samples}


def d3po_loss(beta: float, clip: float, log_density: Tensor, reference_log_density: Tensor) -> Preference:
    """`-log sigmoid(beta (log rho_best - log rho_worst))`, `rho = p_theta / p_ref` clamped to `[1 - clip, 1 + clip]`.

    The log-densities (B, 2), best first, are of B steps of pairs of paths, up to a constant that both models share. A
    ratio outside the bounds has no gradient; `log_ratios` of the result are those before clamping.
    """
    from torch.nn.functional import logsigmoid

    from sharpening.regression import Preference

    log_ratios = log_density - reference_log_density  # (B, 2)
    clamped = log_ratios.clamp(math.log(1 - clip), math.log(1 + clip))
    logits = beta * (clamped[:, 0] - clamped[:, 1])
    return Preference(-logsigmoid(logits), logits, log_ratios)


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
    plan = Plan(args, FLAGS, Method("D3PO", "d3po", "2311.13231"))
    schedule, accelerator, device = plan.schedule, plan.accelerator, plan.device
    check_start(schedule, plan.method.name)
    prompt_data = load_prompts(prompts_file=args.prompts_file, **plan.data_options())
    n, trained_steps = args.num_noisy_latents, args.infer_steps - 1
    prompts_per_step = args.train_batch_size * args.gradient_accumulation_steps
    facts = {"paths": f"best and worst of n = {n} of {args.infer_steps} steps per prompt, {trained_steps} trained on"}
    copied = not args.use_lora
    plan.settle(len(prompt_data.dataset), prompt_data.description, rows_per_step(args), facts, frozen=copied)
    if args.dry_run:
        return 0

    import torch

    from sharpening import sdxl
    from sharpening.data.encoding_cache import cache_embeddings
    from sharpening.draws import draw_noise, draw_paths
    from sharpening.regression import Rows, squared_error
    from sharpening.run import Run
    from sharpening.running.curves import Means, add_divergence, add_preference, add_rewards
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
    reference = run.models.reference(unet)
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
    guidance = unconditional, args.guidance_scale

    # ------------------------------------------------------------------------------------------------ TRAINING
    means = Means(device)
    for step in run.steps(unet):
        # ---------------------------------------------------------------------------------------------- SAMPLE
        batch = next(batches)
        prompts, draws = batch["caption"], batch["draw"].tolist()  # all P of the step, however it is accumulated
        condition = sdxl.Condition.of({**batch, "time_ids": time_ids}, device)  # of P rows
        denoiser = sdxl.Denoiser(unet, condition.repeat(n), *guidance)  # row b * n + i is sample i of prompt b
        noise = draw_noise(args.seed, draws, 1, shape).repeat_interleave(n, 1).flatten(0, 1)  # one for each prompt
        noises, _ = draw_paths(args.seed, draws, n, shape, args.infer_steps)
        unet.eval()
        # One autocast around the pass: it converts the weights once, and forgets them before a gradient is taken.
        with torch.no_grad(), run.phase("generation"), accelerator.autocast():
            sampled = [
                sample_paths(denoiser.rows(part), schedule, upload(noise[part], device), upload(noises[part], device))
                for part in slices(len(noise), args.generation_batch_size)
            ]
        x_0 = torch.cat([part[0] for part in sampled])  # (P * n, 4, h, w)
        paths = Transitions(*map(torch.cat, zip(*(part[1] for part in sampled), strict=True)))

        # ----------------------------------------------------------------------------------------------- SCORE
        def judge(latents: Tensor, rows: list[int], prompts: list[str] = prompts) -> Callable[[], tuple]:
            decoded = sdxl.decode_latents(reward_decoder, latents, args.decode_batch_size)
            return reward.begin(decoded, [prompts[row // n] for row in rows])

        with run.together(step, x_0):
            scores = begin_samples(judge, x_0, args.score_batch_size)()
        scores = scaling.apply(scores, n, means)
        selection = select(scores.rewards, scores.active, n)
        rows = torch.stack([selection.best_rows, selection.worst_rows], 1).flatten()  # (2 P,): best, worst, ...
        add_rewards(means, scores, selection)

        # ----------------------------------------------------------------------------------------------- TRAIN
        unet.train()
        # One pair a step of a prompt: (P, 2, T - 1, ...) becomes rows best, worst, best, worst, ...
        pairs = (part.unflatten(0, (-1, 2)).transpose(1, 2).flatten(0, 2) for part in paths.rows(rows))
        x, t, target, precision = pairs
        of_pairs = Rows(x, t, condition.repeat(2 * trained_steps), target, precision)
        decided = selection.decided.repeat_interleave(trained_steps)  # (P * (T - 1),); the others have no preference
        rewards = selection.branch_reward.flatten()[rows].view(-1, 2).repeat_interleave(trained_steps, 0)
        counts = upload(decided, device)
        guided = run_flags.guided_rows(args.guidance_scale)
        parts = of_pairs.split(args.train_rows // (2 * guided) * 2)  # a loss of whole pairs
        with torch.no_grad(), run.phase("reference"), reference.unet() as frozen, accelerator.autocast():
            reference_outputs = [sdxl.predict_guided(frozen, *part[:3], *guidance) for part in parts]
        first = 0
        for part, reference_output in zip(parts, reference_outputs, strict=True):
            which = slice(first, first := first + len(part.x) // 2)
            with run.exchange(model, part is parts[-1]):
                output = sdxl.predict_guided(model, *part[:3], *guidance)  # (r, 4, h, w)
                densities = (
                    -(part.weight * squared_error(of, part.target)).view(-1, 2) for of in (output, reference_output)
                )
                preference = d3po_loss(args.beta, args.ratio_clip, *densities)
                accelerator.backward((preference.loss * counts[which]).sum() / len(decided))
            add_preference(means, preference, rewards[which], decided[which], won="preference/steps_won")
            beyond = (preference.log_ratios.exp() - 1).abs() > args.ratio_clip
            means.add("preference/clamped", beyond, decided[which, None].expand(-1, 2))
            add_divergence(means, output.detach()[:, None], reference_output[:, None], torch.ones(len(part.x), 1) > 0)

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
