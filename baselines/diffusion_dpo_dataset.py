"""Diffusion-DPO of SDXL (Wallace et al., arXiv 2311.12908) as published: on pairs of images that people compared.

For every pair of a data set in the columns of Pick-a-Pic (`jpg_0`, `jpg_1`, `label_0`, `caption`), without its ties:
    SAMPLE   one noise and one timestep t; noise both images' latents alike.
    TRAIN    -log sigmoid(beta (r_best - r_worst)), r = -(|eps - eps_theta|^2 - |eps - eps_ref|^2).
Nothing is generated and no reward is loaded, but for validation prompts. It is a script of its own because pairs of
the model's own samples (`baselines/diffusion_dpo.py`) have another loop: they are drawn, judged, selected, in rounds.
Left out of the published training: Adafactor, for AdamW. The command is for each of its 16 GPUs: 2048 pairs a step.

    accelerate launch baselines/diffusion_dpo_dataset.py --pretrained_model_name_or_path=MODEL \
        --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --proportion_empty_prompts=0.2 \
        --dataset_name=yuvalkirstain/pickapic_v2 --beta_dpo=2500 --mixed_precision=fp16 --max_train_steps=2000 \
        --train_batch_size=1 --gradient_accumulation_steps=128 --center_crop --random_flip \
        --learning_rate=1e-8 --scale_lr --lr_scheduler=constant_with_warmup --lr_warmup_steps=200
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from reward import REWARD_FLAGS, check_reward_flags, load_reward, reward_options
from sharpening import flags, run_flags
from sharpening.errors import exit_status, require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sharpening.regression import Preference

DATA = tuple(
    replace(flag, default="caption") if flag.name == "caption_column" else flag
    for flag in run_flags.DATA
    if flag.name not in ("train_data_dir", "image_column")
)
PAIRS = (run_flags.BETA_DPO, replace(run_flags.INFER_STEPS, help="sampling steps of validation images", free=True))
FLAGS: flags.Groups = {
    **run_flags.RUN_FLAGS, "data": DATA, "noise and timesteps": run_flags.NOISING, "pairs": PAIRS,
    "reward": REWARD_FLAGS,
}  # fmt: skip


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The resolved flags of a run.

    Raises:
        UserError: naming the flag and the remedy.
    """
    args = run_flags.parse_run(__doc__.splitlines()[0], FLAGS, argv)
    check_reward_flags(vars(args))
    require(args.train_rows >= 2, f"--train_rows is {args.train_rows}, but a pair has 2 rows; raise it")
    return args


def rows_per_step(args: argparse.Namespace) -> dict[str, float]:
    """Rows that one process puts through the UNet in an optimizer step, by purpose: the 2 of each pair for the
    reference and to train. Nothing is decoded."""
    pairs = args.train_batch_size * args.gradient_accumulation_steps
    return {"reference": 2 * pairs, "train": 2 * pairs, "decode": 0}


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
        Stop: with status 1 if the loss or a reward of validation failed, 128 + n by signal n.
    """
    # Imported here, so that --help and a mistyped flag are answered before seconds of imports, --dry_run before those
    # of diffusers' models.
    from sharpening.data.preference_pairs import IMAGES, CachedPairs, load_preference_pairs
    from sharpening.running.plan import Method, Plan

    # -------------------------------------------------------------------------------------------- FLAGS TO RUN
    plan = Plan(args, FLAGS, Method("Diffusion-DPO on compared images", "diffusion-dpo", "2311.12908"))
    schedule, accelerator, device = plan.schedule, plan.accelerator, plan.device
    pairs = load_preference_pairs(**plan.data_options())
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps
    facts = {"pairs": "images of the data set, by its labels; the reward judges validation images alone"}
    copied = not args.use_lora
    plan.settle(len(pairs.dataset), pairs.description, rows_per_step(args), facts, frozen=copied)
    if args.dry_run:
        return 0

    import torch

    from sharpening import sdxl
    from sharpening.data.encoding_cache import cache_latents_and_embeddings
    from sharpening.regression import Regression
    from sharpening.run import Run
    from sharpening.running.curves import Means, add_divergence, add_preference
    from sharpening.trajectory import Branches
    from sharpening.transfer import slices, upload

    run = Run(plan)
    reward = None
    if run.validation_prompts:
        reward = load_reward(args.reward_model, device, processes=plan.world_size, **reward_options(vars(args)))
    run.start_trackers()

    # ----------------------------------------------------------------------------------------- MODELS AND DATA
    vae, _ = run.models.decoders()
    unet = run.models.unet()
    reference = run.models.reference(unet)
    parameters = sdxl.trainable_parameters(unet)
    optimizer, lr_scheduler, ema = run.make_optimizer(unet)
    model, optimizer = run.prepare(unet, optimizer, lr_scheduler, ema)
    regression = Regression(schedule, snr_gamma=args.snr_gamma)

    encoders, unconditional = run.models.text_encoders()
    run.validate_with(encoders, unconditional, vae, reward)
    images = [
        cache_latents_and_embeddings(
            pairs.dataset,
            image_column=column,
            caption_column=args.caption_column,
            resolution=args.resolution,
            center_crop=args.center_crop,
            random_flip=args.random_flip,
            encode_images=lambda pixels: sdxl.encode_images(vae, pixels),
            encode_prompts=encoders.encode,
            **run.cache_options(images=True),
        )
        for column in IMAGES
    ]
    del encoders
    batches, draws = run.batches(CachedPairs(images, pairs.first_is_best)), run.draws()
    decided = torch.ones(pairs_per_step, dtype=torch.bool)

    # ------------------------------------------------------------------------------------------------ TRAINING
    means = Means(device)
    for step in run.steps(unet):
        # ---------------------------------------------------------------------------------------------- SAMPLE
        batch = next(batches)  # all P pairs of the step, however it is accumulated; rows are best, worst, best, ...
        x_0 = upload(batch["latents"], device).float().flatten(0, 1)  # (2 P, 4, h, w)
        noising = draws.noising(batch["draw"], 1, x_0.shape[1:])
        eps, t = upload(noising.eps[:, 0].repeat_interleave(2, 0), device), noising.t.repeat_interleave(2)
        noised = Branches.begin(schedule, x_0, eps, t)
        of_pairs = sdxl.Condition.of(batch, device).without_prompt(unconditional, noising.dropped)
        condition = of_pairs.repeat(2)._replace(time_ids=of_pairs.time_ids.flatten(0, 1))  # of 2 P rows

        # ----------------------------------------------------------------------------------------------- TRAIN
        unet.train()
        path = noised.start()
        with torch.no_grad(), run.phase("reference"), reference.unet() as frozen, accelerator.autocast():
            reference_output = sdxl.predict_along(frozen, path, condition, args.train_rows)  # (2 P, 1, 4, h, w)
        reference_errors = regression.errors(noised, path, reference_output)  # (2 P, 1)
        parts = list(slices(len(t), args.train_rows // 2 * 2))  # a loss of whole pairs
        for part in parts:
            some, of_some, which = noised.rows(part), path.rows(part), slice(part.start // 2, part.stop // 2)
            with run.exchange(model, part is parts[-1]):
                output = sdxl.predict_along(model, of_some, condition.rows(part))  # (r, 1, 4, h, w)
                errors = regression.errors(some, of_some, output).view(-1, 2)
                preference = dpo_loss(args.beta_dpo, errors, reference_errors[part].view(-1, 2))
                accelerator.backward(preference.loss.sum() / pairs_per_step)
            add_preference(means, preference, None, decided[which])
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
        metrics |= run.speed()
        best, worst = torch.arange(len(x_0)).view(-1, 2).T
        run.log_branches(step, batch["caption"], x_0, best=best, worst=worst)
        run.end_step(step, metrics, unet, ema)

    # ---------------------------------------------------------------------------------------------------- SAVE
    run.finish(unet, ema)
    return 0


def cli(argv: Sequence[str]) -> int:
    """`main` on a command line; a `UserError` becomes one sentence on stderr and status 2."""
    return exit_status(lambda: main(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
