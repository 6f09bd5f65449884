"""The score pass and the selection: which branch of every prompt earned most, and which least (eq. 8)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sharpening.regression import masked_mean
from sharpening.trajectory import Branches, Model, Path, Schedule, timesteps_along, walk
from sharpening.transfer import Agree, Index, alone, slices, take, upload
from sharpening.waiting import Begun, beginning, wait_for_all

# `judge(latents (r, ...), rows)` begins to judge r of R rows, which `rows` names; what it returns waits for their
# total reward (r,) and its components, name -> (r,).
Verdict = tuple[Tensor, Mapping[str, Tensor]]
Judge = Callable[[Tensor, list[int]], Callable[[], Verdict]]
ModelOf = Callable[[Index], Model]  # the model with the condition of some of R rows


class Scores(NamedTuple):
    """What was learned about R branches of m steps, or about R samples as if they were branches of one step."""

    rewards: Tensor  # (R, m) float32 on the CPU; 0 where inactive, NaN where the reward failed and was told to skip
    components: dict[str, Tensor]  # name -> (R, m), the raw value of every component of the reward, NaN without one
    active: Tensor  # (R, m) bool on the CPU
    last_estimate: Tensor  # (R, ...) the clean estimate of every branch's last active step


@torch.no_grad()
def score_branches(
    model_of: ModelOf, judge: Judge, schedule: Schedule, branches: Branches, steps: int, batch_size: int,
    agree: Agree = alone, outputs: bool = True,
) -> tuple[Scores, Path]:  # fmt: skip
    """Walk R branches without gradient, judge the clean estimate of every active step, and keep the path.

    `batch_size` branches are walked at a time, so activations grow neither with R nor with `steps`; a latent is kept
    for each step of each branch and, with `outputs`, what the model made of it. No reward is waited for, and none ends
    the walk by failing, before all steps are walked: `agree`, as of `Run.same_forwards`, says how many.
    """
    t = timesteps_along(schedule, branches.t, steps)
    active = (t >= 0).cpu()
    judged: list[tuple[list[int], int]] = []  # (rows, k)
    kept: list[tuple[Tensor, Tensor]] = []  # of each slice: states, last estimates
    made: list[Tensor] = []  # of each slice: outputs
    with Begun() as begun:  # their rewards
        for rows in slices(len(t), batch_size):
            part, x, output = branches.rows(rows), [], []
            last, numbers = part.x_t, range(rows.start, rows.stop)
            on_steps = active[rows].T.tolist()  # (steps, r)
            walked = agree(sum(map(any, on_steps)))
            for k, point in enumerate(walk(model_of(rows), schedule, part.x_t, part.t, walked)):
                x.append(point.x)
                if outputs:
                    output.append(point.output)
                last = point.where_active(point.x0_hat, last)
                on = [index for index, on in enumerate(on_steps[k]) if on]
                if on:
                    judged.append(([numbers[index] for index in on], k))
                    all_on = len(on) == len(numbers)
                    estimate = point.x0_hat if all_on else take([point.x0_hat], torch.tensor(on))[0]
                    begun.begin(partial(judge, estimate, judged[-1][0]))
            ended = steps - len(x)  # nobody looks at the steps below t = 0
            kept.append((torch.stack(x + x[-1:] * ended, 1), last))
            if outputs:
                made.append(torch.stack(output + output[-1:] * ended, 1))
    x, last = map(torch.cat, zip(*kept, strict=True))
    path = Path(x, upload(t.clamp(min=0), x.device), active, torch.cat(made) if outputs else None)
    return Scores(*_collect(judged, begun.wait(), active.shape), active, last), path


@torch.no_grad()
def begin_samples(judge: Judge, x_0: Tensor, batch_size: int) -> Callable[[], Scores]:
    """Begin to judge R clean latents (R, ...), `batch_size` at a time; what is returned waits for their scores."""
    active = torch.ones(len(x_0), 1, dtype=torch.bool)
    judged, waits = [], []
    with beginning(waits):
        for part in slices(len(x_0), batch_size):
            judged.append((list(range(part.start, part.stop)), 0))
            waits.append(judge(x_0[part], judged[-1][0]))
    return lambda: Scores(*_collect(judged, wait_for_all(waits), active.shape), active, x_0)


def _collect(
    judged: Sequence[tuple[list[int], int]], verdicts: Sequence[Verdict], shape: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rewards of (rows, step): all of them and their components as tensors of `shape` (R, m)."""
    rewards, components = torch.zeros(shape), {}
    for (rows, k), (total, parts) in zip(judged, verdicts, strict=True):
        rewards[rows, k] = total
        for name, values in parts.items():
            components.setdefault(name, torch.full(shape, torch.nan))[rows, k] = values
    return rewards, components


class Selection(NamedTuple):
    """Which branch of each of B prompts to learn from."""

    branch_reward: Tensor  # (B, n) mean reward over the active steps of each branch; NaN if one of them has none
    scored: Tensor  # (B, n) bool: the branch has a reward and took part
    best: Tensor  # (B,) index in [0, n), among scored branches
    worst: Tensor  # (B,) index in [0, n), among scored branches
    tied: Tensor  # (B,) bool: best and worst earned the same, so the choice says nothing

    @property
    def decided(self) -> Tensor:
        """(B,) bool: best and worst have scores that differ; the other prompts carry no preference."""
        return (self.scored.sum(1) > 1) & ~self.tied

    @property
    def best_rows(self) -> Tensor:
        """(B,) rows of the best branches, where row b * n + i is branch i of prompt b."""
        return self._rows(self.best)

    @property
    def worst_rows(self) -> Tensor:
        """(B,) rows of the worst branches."""
        return self._rows(self.worst)

    def _rows(self, branch: Tensor) -> Tensor:
        prompts, n = self.branch_reward.shape
        return torch.arange(prompts) * n + branch


def select(rewards: Tensor, active: Tensor, n: int) -> Selection:
    """Best and worst branch of every prompt (eq. 8), never across prompts; rewards and active are (B * n, m).

    The branches of a prompt share t, hence the number of active steps, so the mean ranks them exactly as the sum does.
    A branch with a reward of NaN (`--reward_failure=skip`) is out of the running. Where all of a prompt's are, `best`
    and `worst` are arbitrary and `scored` says so.
    """
    branch_reward = masked_mean(rewards, active).view(-1, n)
    scored = ~branch_reward.isnan()
    as_loser = torch.where(scored, branch_reward, -torch.inf)
    as_winner = torch.where(scored, branch_reward, torch.inf)
    best, worst = as_loser.argmax(1), as_winner.argmin(1)
    tied = scored.any(1) & (as_loser.amax(1) == as_winner.amin(1))
    return Selection(branch_reward, scored, best, worst, tied)
