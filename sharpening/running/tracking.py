"""Metrics, images and curves of a run."""

import json
import logging
import math
import resource
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sharpening.trajectory import Preference, Schedule, Scores, Selection

logger = logging.getLogger(__name__)

ROUNDING = 1e-6  # of a difference of errors near 1 in float32; at the reference itself nothing else is left


class Means:
    """Means over everything that an optimizer step saw: rows, micro-batches and ranks.

    Every rank must add the same names in the same order; a mask may leave a name without any value.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.totals: dict[str, Tensor] = {}  # name -> (2,) float64 sum and count

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Count `values` of any shape, where `mask` of that shape is True."""
        values = values.detach().to(self.device, torch.float64)
        mask = torch.ones_like(values) if mask is None else mask.to(self.device, torch.float64)
        both = torch.stack([torch.where(mask > 0, values, 0).sum(), mask.sum()])
        self.totals[name] = self.totals.get(name, 0) + both

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks, names without a value left out; starts anew."""
        stacked = accelerator.reduce(torch.stack(list(self.totals.values())), reduction="sum").tolist()
        names, self.totals = list(self.totals), {}
        return {name: total / count for name, (total, count) in zip(names, stacked, strict=True) if count}


def add_rewards(means: Means, scores: Scores, selection: Selection, t: Tensor | None, schedule: Schedule) -> None:
    """Add the reward curves of a scored batch of B prompts; t (B,) is where their branches start, if it matters.

    `reward/spread` is the standard deviation over a prompt's branches (the band of the paper's figure 6).
    `reward/timesteps_q1` to `_q4` are the mean reward of branches by the quarter of the training timesteps in which
    they start, q1 being the cleanest. `reward/failure_rate` is the share of branches that have no reward
    (`--reward_failure=skip`); the other curves are over those that have one.
    """
    branch, scored = selection.branch_reward, selection.scored  # (B, n)
    usable = scored.any(1)  # (B,)
    count = scored.sum(1).clamp(min=1)
    mean = torch.where(scored, branch, 0).sum(1) / count  # (B,)
    variance = torch.where(scored, (branch - mean[:, None]).square(), 0).sum(1) / count
    means.add("reward/mean", branch, scored)
    means.add("reward/best", branch.gather(1, selection.best[:, None])[:, 0], usable)
    means.add("reward/worst", branch.gather(1, selection.worst[:, None])[:, 0], usable)
    means.add("reward/spread", variance.sqrt(), usable)
    means.add("reward/tie_rate", selection.tied, usable)
    means.add("reward/failure_rate", ~scored)
    for name, values in scores.components.items():
        means.add(f"reward/component/{name}", values, scores.active & ~values.isnan())
    if t is None:
        return
    quarter = t * 4 // schedule.num_train_timesteps  # (B,)
    for index in range(4):
        means.add(f"reward/timesteps_q{index + 1}", branch, scored & (quarter == index)[:, None])


def add_preference(
    means: Means, preference: Preference, rewards: Tensor, decided: Tensor, divergence: Tensor, active: Tensor
) -> None:
    """Add the curves of B preference pairs; rewards (B, 2), best first, and decided (B,) as in `preference_loss`.

    `preference/accuracy` is the share of pairs in which the model, measured against the reference, fits the better
    branch better (a half where both fit alike, up to rounding), `preference/logits` the mean argument of the
    log-sigmoid, `preference/log_ratio_best` and `_worst` the two surrogates of `log p_theta / p_ref` whose difference
    it scales. `preference/kl` is the mean squared difference of the two models' outputs on the states of the pairs:
    the KL divergence of one denoising step from the reference's, up to the schedule's factor. divergence holds it,
    (2 B, k), for the first k steps; active (2 B, m).
    """
    best, worst = preference.log_ratios.T
    means.add("loss", preference.loss, decided)
    difference = best - worst
    alike = difference.abs() < ROUNDING
    means.add("preference/accuracy", torch.where(alike, 0.5, (difference > 0).float()), decided)
    means.add("preference/logits", preference.logits, decided)
    means.add("preference/log_ratio_best", best, decided)
    means.add("preference/log_ratio_worst", worst, decided)
    means.add("preference/kl", divergence, active[:, : divergence.shape[1]])
    means.add("reward/margin", rewards[:, 0] - rewards[:, 1], decided)


class Watch:
    """Says once what a person would otherwise find out too late: that a run is learning nothing."""

    FLAT_STEPS = 20  # steps in a row in which no prompt's branches differ in reward
    IDLE_STEPS = 20  # steps after which some parameter must have moved
    CHANCE_PAIRS = 2000  # pairs after which the accuracy is compared with a coin's: its standard error is then 0.011

    def __init__(self, args: Namespace, rows: int, parameters: Sequence[Tensor]):
        self.branches, self.rows = args.num_noisy_latents, rows  # rows of an optimizer step, over all processes
        self.flat = self.steps = 0
        self.pairs = self.preferred = 0.0
        self.said: set[str] = set()
        # A few entries of each: Adam moves every entry that has a gradient.
        self.before = self._entries(parameters)

    @staticmethod
    def _entries(parameters: Sequence[Tensor]) -> list[Tensor]:
        return [parameter.detach().flatten()[:64].clone() for parameter in parameters]

    def check(self, metrics: Mapping[str, float], parameters: Sequence[Tensor]) -> None:
        """Look at a finished optimizer step: its metrics, and the parameters after it."""
        self.steps += 1
        self.flat = self.flat + 1 if metrics.get("reward/tie_rate") == 1 else 0
        pairs = self.rows * (1 - metrics.get("reward/tie_rate", 0)) if "preference/accuracy" in metrics else 0
        self.preferred += pairs * metrics.get("preference/accuracy", 0)
        self.pairs += pairs
        if self.flat == self.FLAT_STEPS and self.branches > 1:
            self._warn(
                f"in {self.flat} steps no two branches of a prompt earned different rewards, so nothing is being "
                "selected: look at the images in --output_dir, and try --reward_model on them by `python reward.py`"
            )
        if self.pairs >= self.CHANCE_PAIRS > self.pairs - pairs:
            accuracy, coin = self.preferred / self.pairs, 0.5 + 2 * 0.5 / self.pairs**0.5
            if accuracy < coin:
                self._warn(
                    f"the model preferred the better branch in {accuracy:.3f} of {self.pairs:.0f} pairs, which cannot "
                    "be told from a coin's 0.5 (preference/accuracy): raise --learning_rate, or see in the README "
                    "when --reward_on sample helps"
                )
        if self.steps == self.IDLE_STEPS:
            if all(map(torch.equal, self.before, self._entries(parameters))):
                self._warn(
                    f"no parameter changed in {self.steps} steps: the gradient was zero or skipped each time; look at "
                    "grad_norm, lr and reward/tie_rate, and with --mixed_precision fp16 try bf16"
                )
            self.before = []

    def _warn(self, message: str) -> None:
        kind = message.split(":")[-1]
        if kind not in self.said:
            self.said.add(kind)
            logger.warning(message)


class StepLog:
    """Everything that is said of an optimizer step: `metrics.jsonl`, trackers, progress bar, and `Watch`'s warnings.

    For the main process; on others it writes nothing.
    """

    def __init__(
        self, accelerator: Accelerator, args: Namespace, parameters: Sequence[Tensor], start_step: int, num_steps: int
    ):
        self.accelerator, self.parameters = accelerator, parameters
        self.is_main = accelerator.is_main_process
        self.progress = tqdm(total=num_steps, initial=start_step, desc="steps", disable=not self.is_main)
        rows = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        self.watch = Watch(args, rows, parameters)
        self.path = Path(args.output_dir) / "metrics.jsonl"
        self.file = MetricsFile(self.path, start_step) if self.is_main else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log a finished step."""
        if not self.is_main:
            return
        metrics["peak_memory_gib"] = peak_memory_gib(self.accelerator.device)
        self.watch.check(metrics, self.parameters)
        self.file.append(step, metrics)
        self.accelerator.log(metrics, step=step)
        self.progress.update()
        shown = {name: metrics[name] for name in ("loss", "reward/mean") if name in metrics}
        self.progress.set_postfix({name: f"{value:.4f}" for name, value in shown.items()})


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB since the start: of the GPU's allocator on CUDA, else of the process (Linux ru_maxrss)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsFile:
    """`metrics.jsonl`: one line per optimizer step, so that curves need no tracker.

    A resumed run first drops the lines of steps that its checkpoint does not know.
    """

    def __init__(self, path: Path, start_step: int):
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= start_step] if start_step else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.rename(path)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a kill is ignored."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def to_numpy(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) float in [0, 1] to (B, H, W, 3) uint8."""
    return (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()


def image_grid(images: Tensor, columns: int) -> Image.Image:
    """Images (B, 3, H, W) in [0, 1], row by row, two pixels apart."""
    pixels = to_numpy(images)
    rows = -(-len(pixels) // columns)
    height, width = pixels.shape[1] + 2, pixels.shape[2] + 2
    grid = Image.new("RGB", (columns * width - 2, rows * height - 2), "white")
    for index, array in enumerate(pixels):
        grid.paste(Image.fromarray(array), (index % columns * width, index // columns * height))
    return grid


def log_images(accelerator: Accelerator, output_dir: Path, images: Mapping[str, Tensor], step: int) -> None:
    """Send images, name -> (B, 3, H, W) in [0, 1], to every tracker, and to `output_dir/images` as PNG grids."""
    folder = output_dir / "images"
    folder.mkdir(exist_ok=True)
    for name, value in images.items():
        columns = math.ceil(len(value) ** 0.5)
        image_grid(value, columns).save(folder / f"{name.replace('/', '_')}_{step:06d}.png")
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: to_numpy(value) for name, value in images.items()}, step=step, **layout)


def plot_rewards(metrics_path: Path, image_path: Path) -> None:
    """Mean reward over optimizer steps with the spread over branches as a band (figure 6), best and worst branch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in read_metrics(metrics_path) if "reward/mean" in line]
    if not lines:
        return
    window = max(1, len(lines) // 20)

    def running(name: str) -> np.ndarray:
        return np.convolve([line[name] for line in lines], np.ones(window) / window, mode="valid")

    steps = np.array([line["step"] for line in lines])
    mean, spread = running("reward/mean"), running("reward/spread")
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    axis.plot(steps, [line["reward/mean"] for line in lines], color="0.8", linewidth=0.6, label="mean of each step")
    smoothed = steps[window - 1 :]
    axis.fill_between(smoothed, mean - spread, mean + spread, alpha=0.2, linewidth=0, label="spread over branches")
    axis.plot(smoothed, running("reward/best"), color="tab:green", linewidth=1, label="best branch")
    axis.plot(smoothed, running("reward/worst"), color="tab:red", linewidth=1, label="worst branch")
    axis.plot(smoothed, mean, color="tab:blue", label="mean")
    validated = [(line["step"], line["validation/reward"]) for line in lines if "validation/reward" in line]
    if validated:
        axis.plot(*zip(*validated, strict=True), "ko-", markersize=4, label="validation images")
    note = f" (running mean over {window} steps)" if window > 1 else ""
    axis.set(xlabel="optimizer step", ylabel=f"reward{note}")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(image_path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
