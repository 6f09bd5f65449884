"""What a run leaves to look at: `metrics.jsonl`, trackers, images, and the curve of rewards."""

import json
import math
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sharpening.errors import NO_ROOM, UserError
from sharpening.files import write_aside
from sharpening.progress import progress
from sharpening.running.metric_names import GROUPS, grouped
from sharpening.running.pictures import BranchTable, Pictures, log_pictures
from sharpening.running.watch import Watch
from sharpening.running.writing import attempt


def start_trackers(accelerator: Accelerator, config: Mapping[str, Any], run_id: str, report_to: str) -> None:
    """Start the trackers that `--report_to` names with the settings of the run; W&B continues the run `run_id`.

    Raises:
        UserError: a tracker cannot start.
    """
    config = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in config.items()}
    options = {"dir": str(accelerator.logging_dir), "id": run_id, "resume": "allow"}
    Path(accelerator.logging_dir).mkdir(parents=True, exist_ok=True)
    try:
        accelerator.init_trackers("diffusion-sharpening", config=config, init_kwargs={"wandb": options})
    except Exception as error:
        remedy = "run `wandb login`, set WANDB_MODE=offline, or choose --report_to tensorboard"
        if getattr(error, "errno", None) in NO_ROOM:
            remedy = "free space on the disk of --output_dir"
        raise UserError(
            f"--report_to {report_to}: the tracker did not start ({type(error).__name__}: {error}); {remedy}"
        ) from error
    for tracker in accelerator.trackers:
        if tracker.name == "wandb" and accelerator.is_main_process:
            _define_axes(tracker.tracker)


def _define_axes(run: Any) -> None:
    """Make optimizer steps the x-axis of every group of a W&B run; forwards and seconds can be chosen instead."""
    for axis in ("cost/steps", "cost/forwards", "cost/seconds"):
        run.define_metric(axis)
    for group in GROUPS:
        run.define_metric(f"{group}/*", step_metric="cost/steps")


class StepLog:
    """Everything that is said of an optimizer step: `metrics.jsonl`, trackers, progress bar, and `Watch`'s warnings.

    For the main process; on others it writes nothing. The run goes from step `start` to step `end`. What cannot be
    written raises nothing, because other ranks go on: `failure` says why, for all ranks to agree on.
    """

    def __init__(
        self, accelerator: Accelerator, path: Path, watch: Watch, parameters: Sequence[Tensor], start: int, end: int,
        branch_image_steps: int,
    ):  # fmt: skip
        self.accelerator, self.path, self.watch, self.parameters = accelerator, path, watch, parameters
        self.is_main = accelerator.is_main_process
        self.table = BranchTable(accelerator, end, branch_image_steps)
        self.progress = progress(total=end, initial=start, desc="steps", unit="step")
        self.file, self.failure = MetricsFile(path), ""
        if self.is_main:
            self._try(path.name, lambda: self.file.begin(start))

    def _try(self, what: str, work: Callable[[], object]) -> None:
        failure = attempt(what, work)
        self.failure = self.failure or failure

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log a finished step."""
        if not self.is_main:
            return
        metrics["peak_memory_gib"] = peak_memory_gib(self.accelerator.device)
        self.watch.check(metrics, self.parameters)
        self._try(self.path.name, lambda: self.file.append(step, metrics))
        self._try("the trackers' files", lambda: self.accelerator.log(grouped({"step": step, **metrics}), step=step))
        self.progress.update()
        shown = {name: metrics[name] for name in ("loss", "reward/mean") if name in metrics}
        self.progress.set_postfix({name: f"{value:.4f}" for name, value in shown.items()})

    def write_images(self, step: int, pictures: Mapping[str, Pictures]) -> None:
        """Log images by name; see `log_pictures` and `BranchTable`."""
        self._try("images", lambda: log_pictures(self.accelerator, self.path.parent, pictures, step))
        self._try("images", lambda: self.table.add(step, pictures))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB since the start: of the GPU's allocator on CUDA, else of the process (Linux ru_maxrss)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsFile:
    """`metrics.jsonl`: one line per optimizer step, so that curves need no tracker.

    A value that is not finite, which JSON does not have, is left out, as is one that a step does not have at all.
    """

    def __init__(self, path: Path):
        self.path = path

    def begin(self, start_step: int) -> None:
        """Drop the lines of steps that a resumed run's checkpoint does not know."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step] if start_step else []
        with write_aside(self.path) as aside:
            aside.write_text("".join(map(_as_line, kept)))

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(_as_line({"step": step, **metrics}))


def _as_line(metrics: Mapping[str, float]) -> str:
    return json.dumps({name: value for name, value in metrics.items() if math.isfinite(value)}) + "\n"


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


def plot_rewards(metrics_path: Path, image_path: Path) -> bool:
    """Draw the mean reward with the spread over branches as a band (figure 6), best and worst branch, over optimizer
    steps and over forwards; returns whether there was anything to draw."""
    lines = [line for line in read_metrics(metrics_path) if "reward/mean" in line]
    if not lines:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A run that an earlier version began has no forwards.
    axes = {"step": "optimizer step", "cost/forwards": "forwards of the UNet, 3 for a row that is trained on"}
    names = [name for name in axes if all(name in line for line in lines)]
    window = max(1, len(lines) // 20)
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(5.5 * len(names), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, name in zip(panels[0], names, strict=True):
        _plot_against(axis, lines, name, window)
        axis.set_xlabel(axes[name])
        axis.grid(alpha=0.3)
    note = f" (running mean over {window} steps)" if window > 1 else ""
    panels[0, 0].set_ylabel(f"reward{note}")
    known = panels[0, 0].get_legend_handles_labels()
    figure.legend(*known, loc="outside lower center", ncols=3 * len(names), frameon=False)
    figure.savefig(image_path, dpi=120)
    pyplot.close(figure)
    return True


def _plot_against(axis: Any, lines: Sequence[Mapping[str, float]], name: str, window: int) -> None:
    """The reward of each step over another of its values, with running means over `window` steps."""

    def running(curve: str) -> np.ndarray:
        return np.convolve([line[curve] for line in lines], np.ones(window) / window, mode="valid")

    along = np.array([line[name] for line in lines])
    mean, spread = running("reward/mean"), running("reward/spread")
    axis.plot(along, [line["reward/mean"] for line in lines], color="0.8", linewidth=0.6, label="mean of each step")
    smoothed = along[window - 1 :]
    axis.fill_between(smoothed, mean - spread, mean + spread, alpha=0.2, linewidth=0, label="spread over branches")
    axis.plot(smoothed, running("reward/best"), color="tab:green", linewidth=1, label="best branch")
    axis.plot(smoothed, running("reward/worst"), color="tab:red", linewidth=1, label="worst branch")
    axis.plot(smoothed, mean, color="tab:blue", label="mean")
    validated = [(line[name], line["validation/reward"]) for line in lines if "validation/reward" in line]
    if validated:
        axis.plot(*zip(*validated, strict=True), "ko-", markersize=4, label="validation images")
