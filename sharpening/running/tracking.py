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
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from sharpening.errors import NO_ROOM, UserError
from sharpening.files import write_aside
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


class StepLog:
    """Everything that is said of an optimizer step: `metrics.jsonl`, trackers, progress bar, and `Watch`'s warnings.

    For the main process; on others it writes nothing. The run goes from step `start` to step `end`. What cannot be
    written raises nothing, because other ranks go on: `failure` says why, for all ranks to agree on.
    """

    def __init__(
        self, accelerator: Accelerator, path: Path, watch: Watch, parameters: Sequence[Tensor], start: int, end: int
    ):
        self.accelerator, self.path, self.watch, self.parameters = accelerator, path, watch, parameters
        self.is_main = accelerator.is_main_process
        self.progress = tqdm(total=end, initial=start, desc="steps", disable=not self.is_main)
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
        self._try("the trackers' files", lambda: self.accelerator.log(metrics, step=step))
        self.progress.update()
        shown = {name: metrics[name] for name in ("loss", "reward/mean") if name in metrics}
        self.progress.set_postfix({name: f"{value:.4f}" for name, value in shown.items()})

    def write_images(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Log images, name -> (B, 3, H, W) in [0, 1]; see `log_images`."""
        self._try("images", lambda: log_images(self.accelerator, self.path.parent, images, step))


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


def to_numpy(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) float in [0, 1] to (B, H, W, 3) uint8."""
    return (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()


def image_grid(images: Tensor, columns: int) -> Image.Image:
    """Images (B, 3, H, W) in [0, 1], row by row, on white."""
    pixels = (images * 255).round().to(torch.uint8).cpu()
    return to_pil_image(make_grid(pixels, nrow=columns, pad_value=255))


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


def plot_rewards(metrics_path: Path, image_path: Path) -> bool:
    """Draw the mean reward over optimizer steps with the spread over branches as a band (figure 6), best and worst
    branch; returns whether there was anything to draw."""
    lines = [line for line in read_metrics(metrics_path) if "reward/mean" in line]
    if not lines:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    return True
