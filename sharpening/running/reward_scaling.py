"""`--reward_scaling`: weighted sums of rewards whose scales differ, so that their weights mean importance."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.distributed import ProcessGroup

from sharpening.regression import masked_mean
from sharpening.rewards.spec import Component
from sharpening.running.curves import Means
from sharpening.running.launching import sum_over_ranks
from sharpening.selection import Scores

ROUNDING = 1e-6  # relative, of float32
DECAY = 0.99  # of what earlier steps count, with each step: a hundred steps are remembered


class RewardScaling:
    """What becomes of the components of a reward before branches are selected by their weighted sum.

    Attributes:
        kind: "none" leaves the sum as the reward made it. "spread" divides each component by its running standard
            deviation within prompts, which takes in the step that it is applied to: of two components of weight 1,
            each then spreads as much over the branches of a prompt, whatever its unit. One that has not differed yet
            is not divided.
        kept: what a checkpoint has to keep for all processes, and may hold more.
    """

    def __init__(
        self,
        kind: Literal["none", "spread"],
        components: Sequence[Component],
        hosts: ProcessGroup | None,
        kept: dict[str, Any] | None = None,
    ) -> None:
        """hosts: as of `launching.any_rank`. kept: becomes the attribute of that name, an empty dictionary if None."""
        self.kind, self.components, self.hosts = kind, components, hosts
        self.kept: dict[str, Any] = {} if kept is None else kept

    def apply(self, scores: Scores, n: int, means: Means) -> Scores:
        """The scores of the n branches of each of a step's prompts, their rewards formed anew.

        Every rank must call it in every step; one small sum goes over the hosts. Adds the curves `reward/scale/NAME`.
        """
        if self.kind == "none":
            return scores
        values = torch.stack([scores.components[component.name] for component in self.components]).double()
        scales = self._scales(masked_mean(values, scores.active).unflatten(1, (-1, n)))  # (C,)
        weights = torch.tensor([component.weight for component in self.components], dtype=torch.float64)
        total = ((weights / scales)[:, None, None] * values).sum(0).float()  # (R, m)
        for component, scale in zip(self.components, scales, strict=True):
            means.add(f"reward/scale/{component.name}", scale[None])
        return scores._replace(rewards=torch.where(scores.active, total, 0))

    def _scales(self, branch: torch.Tensor) -> torch.Tensor:
        """The running standard deviations (C,), taking in the components (C, B, n) of branches, NaN without one."""
        scored = ~branch.isnan()
        count = scored.sum(2, keepdim=True)
        mean = branch.nansum(2, keepdim=True) / count.clamp(min=1)
        away = torch.where(scored, branch - mean, 0)
        # What rounding alone makes differ does not: divided by that, it would drown every other component.
        differ = away.abs().amax(2, keepdim=True) > ROUNDING * branch.nan_to_num().abs().amax(2, keepdim=True)
        squares = torch.where(differ, away.square(), 0).sum((1, 2))
        degrees = (count - 1).clamp(min=0).sum((1, 2))
        step = sum_over_ranks(torch.stack([squares, degrees], 1), self.hosts)  # (C, 2)
        before = self.kept.get("spread", {})
        sums = torch.stack(
            [
                DECAY * torch.tensor(before.get(component.name, [0.0, 0.0]), dtype=torch.float64) + of_step
                for component, of_step in zip(self.components, step, strict=True)
            ]
        )
        names = [component.name for component in self.components]
        self.kept["spread"] = dict(zip(names, sums.tolist(), strict=True))
        variance = sums[:, 0] / sums[:, 1].clamp(min=1e-30)
        return torch.where(variance > 0, variance.sqrt(), 1)
