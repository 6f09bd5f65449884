"""Calling rewards: images in any form in, checked scores out, and what becomes of a reward that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sharpening.errors import first_line
from sharpening.waiting import beginning, wait_for_all

if TYPE_CHECKING:
    from sharpening.rewards.spec import Component

logger = logging.getLogger(__name__)

Images = Image.Image | Sequence[Image.Image] | Tensor
Result = Tensor | tuple[Tensor, dict[str, Tensor]]
Scorer = Callable[[Tensor, list[str]], Result | Callable[[], Result]]
Verdict = tuple[Tensor, dict[str, Tensor]]


class RewardError(RuntimeError):
    """A reward failed or returned something that is no reward. The message is one sentence that names all of it.

    Attributes:
        reward: name of the component.
        rows: rows of the batch concerned; all of them if the reward as a whole failed.
        prompts: the prompts of those rows.
    """

    def __init__(self, reward: str, problem: str, rows: list[int], prompts: list[str]) -> None:
        self.reward, self.rows, self.prompts = reward, rows, prompts
        shown = [f"row {row}: {prompt!r}" for row, prompt in zip(rows[:8], prompts[:8], strict=True)]
        if len(rows) > 8:
            shown.append(f"and {len(rows) - 8} more")
        super().__init__(f"the reward {reward} {problem} ({'; '.join(shown)})")


@dataclass
class RowsFailed(Exception):
    """Raised by a reward that could score some images of a batch only.

    `--reward_failure` decides what follows: the run stops, or the branches of those images are left out of selection.

    Attributes:
        result: what the reward would have returned, with NaN for the images that failed.
        reasons: for each of those rows, why.
    """

    result: Result
    reasons: dict[int, str]


class Reward:
    """A weighted sum of rewards, as `reward.load_reward` makes it; each component is called once per batch.

    Each method takes images as one PIL image, a list of PIL images, or a float tensor `(B, 3, H, W)` in [0, 1], on any
    device; and prompts as a list of B strings, or one string for one image. Tensors stay tensors and PIL images become
    tensors, so that both score alike; a list of images of several sizes is scored in one batch per size.

    Results are float32 on the CPU, `(B,)`, higher is better; no gradient flows. They are finite, except that with
    `failure="skip"` an image that a component could not score is NaN, in that component and in the sum.

    Attributes:
        components: what is summed.
        failure: what becomes of an image that could not be scored.
        judged: images that were given to it so far.

    Raises (each method):
        RewardError: if a component raises, or returns anything but B finite numbers (`failure="raise"`).
        ValueError: if images or prompts are not of the forms above.
    """

    def __init__(
        self, components: list[Component], scorers: list[Scorer], failure: Literal["raise", "skip"] = "raise"
    ) -> None:
        self.components = components
        self.failure = failure
        self.judged = 0
        self._scorers = scorers

    def get_reward(self, images: Images, prompts: str | list[str]) -> Tensor:
        """The weighted sum of the components, `(B,)`."""
        return self.score(images, prompts)[0]

    def get_components(self, images: Images, prompts: str | list[str]) -> dict[str, Tensor]:
        """The components by name and their parts by `name/part`, `(B,)` each, without their weights."""
        return self.score(images, prompts)[1]

    def score(self, images: Images, prompts: str | list[str]) -> Verdict:
        """The weighted sum and the raw components from one call of each, for training that also logs the parts."""
        return self.begin(images, prompts)()

    def begin(self, images: Images, prompts: str | list[str]) -> Callable[[], Verdict]:
        """Begin to `score`; what is returned waits for the result. Meanwhile a component's server can work."""
        if isinstance(prompts, str):
            prompts = [prompts]
        self.judged += len(prompts)
        called: list[tuple[list[int], Component]] = []
        waits: list[Callable[[], Verdict]] = []  # for their scores
        whole: list[tuple[list[int], Tensor]] = []  # whether all pixels of an image are finite
        with beginning(waits):
            for rows, batch in _batches(images, prompts):
                finite = batch.flatten(1).isfinite().all(1)
                whole.append((rows, finite))
                # Asking a GPU which are broken is waiting for it, until the end of the pass; till then they are black.
                batch = torch.where(finite[:, None, None, None], batch, 0)
                if batch.device.type == "cpu" and not all(finite.tolist()):
                    rows, batch = [row for row, good in zip(rows, finite.tolist(), strict=True) if good], batch[finite]
                    if not rows:
                        continue
                batch_prompts = [prompts[row] for row in rows]
                for component, scorer in zip(self.components, self._scorers, strict=True):
                    called.append((rows, component))
                    waits.append(self._begin(component.name, scorer, batch, batch_prompts, rows))
        return lambda: self._sum(called, waits, whole, prompts)

    def _sum(
        self,
        called: list[tuple[list[int], Component]],
        waits: list[Callable[[], Verdict]],
        whole: list[tuple[list[int], Tensor]],
        prompts: list[str],
    ) -> Verdict:
        """Wait for all components: their weighted sum and their values, NaN for images that were broken."""
        names, all_broken = "+".join(component.name for component in self.components), []
        with beginning(waits):
            for rows, finite in whole:
                broken = [row for row, good in zip(rows, finite.cpu().tolist(), strict=True) if not good]
                all_broken += broken
                if broken:
                    problem = f"was given {len(broken)} of {len(rows)} images with NaN or infinite pixels"
                    self._fail(RewardError(names, problem, broken, [prompts[row] for row in broken]))
        total = torch.zeros(len(prompts))
        values = {component.name: torch.full((len(prompts),), torch.nan) for component in self.components}
        for (rows, component), (scores, parts) in zip(called, wait_for_all(waits), strict=True):
            total[rows] += component.weight * scores
            named = {component.name: scores} | {f"{component.name}/{part}": v for part, v in parts.items()}
            for name, column in named.items():
                values.setdefault(name, torch.full((len(prompts),), torch.nan))[rows] = column
        if total.isinf().any():  # only weights beyond float32 lead here
            rows = total.isinf().nonzero().flatten().tolist()
            raise RewardError(names, "has a weighted sum beyond float32", rows, [prompts[row] for row in rows])
        for column in (total, *values.values()):
            column[all_broken] = torch.nan
        return total, values

    def _fail(self, error: RewardError) -> None:
        """Raise the error of some rows, or say that they are skipped."""
        if self.failure == "raise":
            raise error
        logger.warning(f"left out of selection: {error}")

    def _begin(
        self,
        name: str,
        scorer: Scorer,
        images: Tensor,  # (B, 3, H, W)
        prompts: list[str],
        rows: list[int],  # of `images` within the whole call
    ) -> Callable[[], Verdict]:
        """Call the scorer; what is returned waits for its scores if it does, and checks them."""

        device_type = images.device.type  # of its own: what waits for a grader need not keep the images

        def guarded(call: Callable[[], object]) -> tuple[object, dict[int, str]]:
            try:
                # A reward has a dtype of its own, whatever the pass that asks it is in.
                with torch.no_grad(), torch.autocast(device_type, enabled=False):
                    return call(), {}
            except RowsFailed as error:
                return error.result, error.reasons
            except Exception as error:
                raise RewardError(name, f"failed with {first_line(error)}", rows, prompts) from error

        # Copies, so that a reward that edits its input cannot mislead the ones after it.
        result, reasons = guarded(lambda: scorer(images.clone(), list(prompts)))
        if callable(result):
            return lambda: self._checked(name, *guarded(result), prompts, rows)
        return lambda: self._checked(name, result, reasons, prompts, rows)

    def _checked(
        self, name: str, result: object, reasons: dict[int, str], prompts: list[str], rows: list[int]
    ) -> Verdict:
        """What a scorer returned, `(B,)` float32 on the CPU, and its parts, NaN where skipped; or a RewardError."""
        scores, parts = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        parts = parts if isinstance(parts, dict) else {"": parts}
        for value in (scores, *parts.values()):
            if not isinstance(value, Tensor):
                raise RewardError(name, f"returned a {type(value).__name__} instead of a torch.Tensor", rows, prompts)
            if value.shape != (len(prompts),) or value.is_complex():
                problem = f"returned {value.dtype} {tuple(value.shape)} instead of real numbers of shape "
                raise RewardError(name, f"{problem}({len(prompts)},)", rows, prompts)
        scores = scores.detach().to("cpu", torch.float32)
        parts = {part: value.detach().to("cpu", torch.float32) for part, value in parts.items()}
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            why = "; ".join(dict.fromkeys(reasons[row] for row in bad if row in reasons))
            returned = why or "returned " + ", ".join(str(scores[row].item()) for row in bad[:8])
            error = RewardError(
                name, f"{returned} for {len(bad)} of {len(prompts)} images", [rows[row] for row in bad],
                [prompts[row] for row in bad],
            )  # fmt: skip
            self._fail(error)
            scores = torch.where(scores.isfinite(), scores, torch.nan)
        return scores, parts


def _batches(images: Images, prompts: list[str]) -> list[tuple[list[int], Tensor]]:
    """The images as `(rows, tensor (len(rows), 3, H, W) float32)` per image size; ValueError for malformed input."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be a float tensor (B, 3, H, W) in [0, 1], not {images.dtype} {tuple(images.shape)}"
            )
        count, batches = len(images), [(list(range(len(images))), images.detach().float())]
    else:
        images = [images] if isinstance(images, Image.Image) else list(images)
        rows_of_size: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(images):
            if not isinstance(image, Image.Image):
                raise ValueError(f"images must be PIL images or one tensor (B, 3, H, W), not a {type(image).__name__}")
            rows_of_size.setdefault(image.size, []).append(row)
        count, batches = len(images), []
        for rows in rows_of_size.values():
            pixels = np.stack([np.asarray(images[row].convert("RGB")) for row in rows])  # (B, H, W, 3) uint8
            batches.append((rows, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255))
    if count == 0 or count != len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"each image needs its prompt, a string: got {count} images and {len(prompts)} prompts")
    return batches
