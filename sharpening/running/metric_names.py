"""The curves of a run: how trackers group them, and what each says."""

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

GROUPS = ("reward", "validation", "preference", "train", "time", "cost")
PHASES = ("generation", "score", "reference", "train", "validation")  # of a step, in `time/`
# `metrics.jsonl` keeps the names of the published code; trackers and the dashboard have every curve in a group.
IN_GROUP = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "scaler/scale": "train/scaler_scale",
    "scaler/skipped": "train/scaler_skipped",
    "samples_per_second": "time/samples_per_second",
    "generation_time_share": "time/generation_share",
    "peak_memory_gib": "cost/peak_memory_gib",
    "step": "cost/steps",
}
MEANING = {
    "reward/mean": "over a prompt's branches, then over prompts; should rise",
    "reward/best": "the best branch of each prompt",
    "reward/worst": "the worst branch of each prompt",
    "reward/spread": "standard deviation over a prompt's branches; at 0 there is nothing to select",
    "reward/margin": "reward of the best branch minus that of the worst",
    "reward/tie_rate": "share of prompts whose branches all earned the same; they teach nothing",
    "reward/failure_rate": "share of branches that have no score",
    "validation/reward": "of images drawn from the validation prompts; should rise with reward/mean",
    "validation/reward_standard_error": "of validation/reward",
    "preference/accuracy": "share of pairs whose better branch the model prefers; a coin has 0.5",
    "preference/logits": "mean argument of the log-sigmoid; beyond 5 little gradient is left",
    "preference/log_ratio_best": "change of log likelihood of the better branch, by the reference",
    "preference/log_ratio_worst": "of the worse branch; if both fall far, the model makes its own samples less likely",
    "preference/kl": "distance from the reference; should rise slowly",
    "preference/bounded": "share of pairs whose worse branch is pushed away no more",
    "preference/steps_won": "share of steps at which the better path gained more likelihood",
    "preference/clamped": "share of ratios beyond --ratio_clip, which have no gradient",
    "train/loss": "of the step; not comparable between objectives",
    "train/grad_norm": "before it is clipped",
    "train/lr": "learning rate",
    "train/scaler_scale": "loss scale of fp16",
    "train/scaler_skipped": "1 if fp16's gradient overflowed and the step was skipped",
    "time/step": "seconds of a step, without validation",
    "time/generation": "seconds to draw latents",
    "time/score": "seconds to walk, decode and judge branches",
    "time/reference": "seconds of the reference's forwards",
    "time/train": "seconds of forwards with gradient and of their backward",
    "time/validation": "seconds of validation",
    "time/other": "seconds of everything else: data, selection, the optimizer, pictures",
    "time/samples_per_second": "prompts of all processes per second",
    "time/generation_share": "share of a step's time that is spent generating",
    "cost/forwards": "rows through the UNet so far; a row that is trained on counts 3",
    "cost/rows_without_gradient": "rows so far in forwards without gradient",
    "cost/rows_trained": "rows so far in forwards with gradient",
    "cost/images_judged": "images that the reward has judged so far",
    "cost/seconds": "seconds of training so far, without validation",
    "cost/peak_memory_gib": "GiB of the main process since its start: of the GPU, else of the host",
}

OF_PREFIX = {  # curves that a run has several of
    "reward/component/": "each component of the reward, and its parts as `NAME/PART`, without weights",
    "reward/scale/": "`--reward_scaling spread`: what a component is divided by",
    "reward/timesteps_": "mean reward by the quarter of the timesteps in which branches start, q1 the cleanest",
}


def meaning(name: str) -> str:
    """What a curve says; nothing of one that no run here writes."""
    return MEANING.get(name) or next((says for start, says in OF_PREFIX.items() if name.startswith(start)), "")


def grouped(metrics: Mapping[str, Value]) -> dict[str, Value]:
    """The same under the names that trackers have them by."""
    return {IN_GROUP.get(name, name): value for name, value in metrics.items()}
