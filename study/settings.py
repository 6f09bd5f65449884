"""The settings of the study: of its methods, its data, and how much of everything."""

from __future__ import annotations

from dataclasses import dataclass

METRICS = {name: f"study/metrics.py:{name}" for name in ("colour", "shape", "background", "likeness")}
COMMON = {
    "resolution": 32, "reward_model": "shapes", "train_batch_size": 24, "lr_scheduler": "cosine", "use_ema": True,
    "ema_decay": 0.95, "adam_weight_decay": 0, "score_batch_size": 96, "decode_batch_size": 96, "train_rows": 96,
    "report_to": "none", "validation_guidance_scale": 1, "validation_epochs": 0, "checkpointing_steps": 1_000_000,
}  # fmt: skip
IMAGES = {"center_crop": True, "proportion_empty_prompts": 0.1, "learning_rate": 5e-4}
# Few steps: what is drawn for less is as good to learn from (docs/study.md), for whoever draws.
DRAWN = {"num_noisy_latents": 4, "infer_steps": 5, "guidance_scale": 1, "generation_batch_size": 96}
# RLHF on samples without what makes it cheap, of which tables 2 and 3 vary n and m.
SAMPLES = {
    **DRAWN, "infer_steps": 10, "reward_on": "sample", "latents_per_prompt": "n", "branch_noise": "shared",
    "trajectory_nums": 1, "beta_dpo": 200, "learning_rate": 1e-4,
}  # fmt: skip
# As scripts/quickstart_rlhf.sh has it.
EFFICIENT = {
    "preset": "efficient", "num_noisy_latents": 8, "infer_steps": 5, "guidance_scale": 1, "beta_dpo": 200,
    "learning_rate": 1e-4, "generation_batch_size": 96,
}  # fmt: skip
PAIRS = {**DRAWN, "beta_dpo": 200, "learning_rate": 1e-4}
PATHS = {
    "num_noisy_latents": 4, "trajectory_nums": 4, "infer_steps": 5, "generation_batch_size": 96, "learning_rate": 1e-4,
}  # fmt: skip
PAIRS_OF_PATHS = {
    "num_noisy_latents": 4, "infer_steps": 5, "guidance_scale": 1, "generation_batch_size": 96, "learning_rate": 3e-4,
}  # fmt: skip
# As the paper has it, but without guidance, which all models here are judged without.
LETTER = {
    "num_noisy_latents": 3, "trajectory_nums": 3, "infer_steps": 25, "guidance_scale": 1, "beta_dpo": 2500,
    "learning_rate": 1e-4, "generation_batch_size": 96,
}  # fmt: skip
PLAIN = {"num_noisy_latents": 1, "trajectory_nums": 1}
SHARPENED = {"num_noisy_latents": 3, "trajectory_nums": 3}
WRONG_CAPTIONS = 0.4  # the share that the base model was trained on
DATA = {"shapes": "right captions", "shapes_wrong": f"{WRONG_CAPTIONS:.0%} wrong captions"}  # folder -> what it holds


def short(rate: float) -> str:
    """A learning rate as part of an identifier: 0.0005 is lr0_0005, and a third of 1e-4 is lr3_3e_05."""
    return f"lr{rate:.2g}".translate(str.maketrans(".-", "__"))


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    budgets: tuple[int, ...] = (
        40_000,
        120_000,
    )  # forwards of a row, of a method of table 1; tuned at the least
    rate_factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)  # what the learning rate is multiplied by when tuning
    tuned: int | None = None  # how many methods of table 1 are tuned; None: all
    tuning_images: int = 200  # per setting that is tried
    shown_images: int = 12  # of a prompt, per point of reward against compute
    updates: int = 150  # of SFT where updates are equal
    preference_updates: int = 100  # of RLHF where updates are equal
    images: int = 400  # per trained model
    search_images: int = 180
    data: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = (1e-4, 5e-4, 1e-3)
    sweep: tuple[int, ...] = (1, 2, 3, 4, 8)  # of n and of m
    search: tuple[int, ...] = (2, 4, 8, 16)
    reference_sets: int = 10
    batch: int = 24
    validation_images: int = 36  # of a prompt, per point of reward against updates


QUICK = Size(
    budgets=(1000,), rate_factors=(1.0,), tuned=1, tuning_images=9, shown_images=1, updates=3,
    preference_updates=2, images=18, search_images=9, data=60, seeds=(0,), learning_rates=(5e-4,), sweep=(1, 2),
    search=(2,), reference_sets=1, batch=4, validation_images=4,
)  # fmt: skip


# The learning rate of figure 4, and its three runs.
SFT_NAME = f"sft_{short(IMAGES['learning_rate'])}"
SHOWN_OVER_TIME = {f"{SFT_NAME}_{which}" for which in ("n3_m3", "n1_m1", "n1_m1_long")}
