"""Images of a run with what there is to say of each: as PNG grids, for trackers, and as W&B's table of branches."""

from __future__ import annotations

import math
import string
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from sharpening.regression import masked_mean

if TYPE_CHECKING:
    from sharpening.selection import Scores

CAPTIONED_WIDTH = 160  # pixels; smaller images are enlarged, so that there is room for words below them
LINES_OF_PROMPT = 3
TABLE_COLUMNS = ("step", "kind", "prompt", "reward", "components", "timestep", "image")
TABLE_IMAGE_WIDTH = 256
TABLE_ROWS_AT_ONCE = 4  # of each kind
TABLE_ROWS = 400  # of a run, at most


class Pictures(NamedTuple):
    """B images and what is known of them."""

    images: Tensor  # (B, 3, H, W) float in [0, 1]
    prompts: list[str]
    rewards: list[float]  # NaN where an image has none
    components: list[dict[str, float]]  # of the reward, by name, where it has more than one
    timesteps: list[int | None]  # where the branch of an image starts

    @classmethod
    def judged(cls, images: Tensor, prompts: Sequence[str], rewards: Tensor) -> Pictures:
        """Finished images (B, 3, H, W) with their rewards (B,)."""
        return cls(images, list(prompts), rewards.tolist(), [{} for _ in prompts], [None] * len(prompts))

    @classmethod
    def branches(
        cls, decode: Callable[[Tensor], Tensor], latents: Tensor, rows: Tensor, prompts: Sequence[str],
        scores: Scores | None, t: Tensor | None,
    ) -> Pictures:  # fmt: skip
        """The images that `decode` makes of some rows of latents (R, 4, h, w), R / P of which belong to each of P
        prompts; with R scores, means over the steps of a branch, and with the first timestep t (P,) of a prompt's
        branches, where they are given."""
        of_prompt = (rows * len(prompts) // len(latents)).tolist()
        rewards, components = [math.nan] * len(rows), [{} for _ in rows]
        if scores is not None:
            means = {name: _mean(values, scores.active, rows) for name, values in scores.components.items()}
            rewards = _mean(scores.rewards, scores.active, rows)
            if len(means) > 1:
                components = [{name: of[i] for name, of in means.items()} for i in range(len(rows))]
        timesteps = [None if t is None else int(t[prompt]) for prompt in of_prompt]
        return cls(decode(latents[rows]), [prompts[prompt] for prompt in of_prompt], rewards, components, timesteps)

    def facts(self, index: int) -> str:
        """What is known of an image but its prompt, in words."""
        named = {"reward": self.rewards[index], **self.components[index]}
        said = [f"{name} {value:.3g}" for name, value in named.items() if not math.isnan(value)]
        if self.timesteps[index] is not None:
            said.append(f"t {self.timesteps[index]}")
        return ", ".join(said)

    def captions(self) -> list[str]:
        """A line for each image."""
        return [" | ".join(filter(None, (p, self.facts(i)))) for i, p in enumerate(self.prompts)]

    def pixels(self) -> np.ndarray:
        """(B, H, W, 3) uint8."""
        return (self.images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _mean(values: Tensor, active: Tensor, rows: Tensor) -> list[float]:
    """The means over active steps of some rows of values (R, m)."""
    return masked_mean(values[rows], active[rows]).tolist()


def captioned_grid(pictures: Pictures) -> Image.Image:
    """The images, row by row, on white, each above its prompt and what else is known of it; small ones enlarged."""
    columns = math.ceil(len(pictures.images) ** 0.5)
    enlarged = math.ceil(CAPTIONED_WIDTH / pictures.images.shape[-1])
    images = pictures.images.repeat_interleave(enlarged, -2).repeat_interleave(enlarged, -1)
    height, width = images.shape[-2:]
    font = ImageFont.load_default(max(11, width // 24))
    of_a_letter = font.getlength(string.ascii_lowercase) / len(string.ascii_lowercase)
    letters = int(width / of_a_letter)  # that a line holds
    texts = [
        [
            *textwrap.wrap(prompt, letters, max_lines=LINES_OF_PROMPT, placeholder=" ..."),
            *textwrap.wrap(pictures.facts(index), letters),
        ]
        for index, prompt in enumerate(pictures.prompts)
    ]
    line = sum(font.getmetrics()) + 1
    gap = max(4, width // 40)
    cell = (width + gap, height + gap + line * max(map(len, texts)))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left, top = gap + index % columns * cell[0], gap + index // columns * cell[1]
        grid.paste(to_pil_image((image * 255).round().to(torch.uint8).cpu()), (left, top))
        for number, text in enumerate(lines):
            draw.text((left, top + height + number * line), text, "black", font)
    return grid


def log_pictures(accelerator: Accelerator, output_dir: Path, pictures: Mapping[str, Pictures], step: int) -> None:
    """Send images by name to every tracker, and to `output_dir/images` as PNG grids, with their captions: W&B has
    each image apart, TensorBoard the grid."""
    folder = output_dir / "images"
    folder.mkdir(exist_ok=True)
    grids = {name: captioned_grid(of_name) for name, of_name in pictures.items()}
    for name, grid in grids.items():
        grid.save(folder / f"{name.replace('/', '_')}_{step:06d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            arrays = {name: np.asarray(grid)[None] for name, grid in grids.items()}
            tracker.log_images(arrays, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log({name: _for_wandb(of_name) for name, of_name in pictures.items()}, step=step)


def _for_wandb(pictures: Pictures) -> list[Any]:
    import wandb

    pairs = zip(pictures.pixels(), pictures.captions(), strict=True)
    return [wandb.Image(pixels, caption=caption) for pixels, caption in pairs]


class BranchTable:
    """W&B's table of the best and the worst branches, whose rows can be sorted and filtered.

    Its rows are the highest of the best and the lowest of the worst branches that are shown at a step. There are at
    most `TABLE_ROWS` of a run, spread over all of it.
    """

    def __init__(self, accelerator: Accelerator, steps: int, every: int) -> None:
        """For a run of so many steps that shows branches `every` so many."""
        self.tracker = next((tracker for tracker in accelerator.trackers if tracker.name == "wandb"), None)
        at_once = 2 * TABLE_ROWS_AT_ONCE
        self.every = every * max(1, math.ceil(steps // every * at_once / TABLE_ROWS))
        self.table: Any = None

    def add(self, step: int, pictures: Mapping[str, Pictures]) -> None:
        """Add rows for what of `pictures`, by name, is called branches/best and branches/worst, if it is time."""
        kinds = {name.removeprefix("branches/"): of for name, of in pictures.items() if name.startswith("branches/")}
        if self.tracker is None or step % self.every or not kinds:
            return
        import wandb

        if self.table is None:
            self.table = wandb.Table(columns=list(TABLE_COLUMNS), log_mode="INCREMENTAL")
        for kind, shown in kinds.items():
            extreme = np.argsort([-reward if kind == "best" else reward for reward in shown.rewards])  # NaN last
            pixels = shown.pixels()
            for index in extreme[:TABLE_ROWS_AT_ONCE].tolist():
                image, reward = Image.fromarray(pixels[index]), shown.rewards[index]
                image.thumbnail((TABLE_IMAGE_WIDTH, TABLE_IMAGE_WIDTH))
                self.table.add_data(
                    step, kind, shown.prompts[index], None if math.isnan(reward) else reward,
                    ", ".join(f"{name} {value:.3g}" for name, value in shown.components[index].items()),
                    shown.timesteps[index], wandb.Image(image),
                )  # fmt: skip
        self.tracker.log({"branches/table": self.table}, step=step)
