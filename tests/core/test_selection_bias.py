"""What selecting among noises of a given image does to the regression, in one dimension, where all is known exactly.

`docs/study.md` argues with it: the branch that is selected says where the model is already right, not which image to
prefer. Given the state, selection of the best branch even makes the image of lower reward the likelier one.
"""

import pytest
import torch

from sharpening.selection import score_branches, select
from sharpening.trajectory import Branches, Model, Schedule

ALPHA_SQUARED = 0.3  # little is left of the image


@pytest.fixture(scope="module")
def branches():
    """40,000 images, -1 or 1, with 8 branches each; the model knows the posterior, the reward is its estimate."""
    alpha, variance = ALPHA_SQUARED**0.5, 1 - ALPHA_SQUARED
    schedule = Schedule(torch.tensor([ALPHA_SQUARED]), 1.0, "sample", 1, torch.tensor([0]))
    generator = torch.Generator().manual_seed(0)
    images, n = 40_000, 8
    x_0 = torch.randint(2, (images, 1), generator=generator).repeat_interleave(n, 0) * 2.0 - 1
    eps = torch.randn(images * n, 1, generator=generator)
    t = torch.zeros(images * n, dtype=torch.long)
    begun = Branches.begin(schedule, x_0, eps, t)
    model = Model(lambda x, t: torch.tanh(alpha * x / variance))  # E[x_0 | x_t]
    scores, _ = score_branches(
        lambda rows: model, lambda x0_hat, rows: lambda: (x0_hat.flatten(), {}), schedule, begun, 1, len(t)
    )
    return x_0.view(images, n), begun.x_t.view(images, n), select(scores.rewards, scores.active, n)


def chosen(part, branch):
    return part.gather(1, branch[:, None])[:, 0]


def mean_image_near(x_0, x_t, state, width=0.15):
    """What the regression is told at a state: the mean image of the examples there, and its standard error."""
    there = x_0[(x_t - state).abs() < width]
    return float(there.mean()), float(there.std() / len(there) ** 0.5)


def test_every_branch_tells_the_posterior_mean(branches):
    x_0, x_t, _ = branches
    for state in (-1.0, 0.0, 1.0):
        mean, error = mean_image_near(x_0.flatten(), x_t.flatten(), state)
        expected = torch.tanh(torch.tensor(ALPHA_SQUARED**0.5 * state / (1 - ALPHA_SQUARED)))
        assert abs(mean - float(expected)) < 4 * error + 0.01


def test_the_best_branch_visits_states_the_model_likes(branches):
    _, x_t, selection = branches
    assert chosen(x_t, selection.best).mean() > x_t.mean() + 0.5
    assert chosen(x_t, selection.worst).mean() < x_t.mean() - 0.5


@pytest.mark.parametrize("state", [0.3, 0.8])
def test_at_a_state_the_best_branch_tells_of_the_worse_image_and_the_worst_of_the_better(branches, state):
    x_0, x_t, selection = branches
    every, _ = mean_image_near(x_0.flatten(), x_t.flatten(), state)
    best, best_error = mean_image_near(chosen(x_0, selection.best), chosen(x_t, selection.best), state)
    assert best < every - 4 * best_error
    state = -state
    every, _ = mean_image_near(x_0.flatten(), x_t.flatten(), state)
    worst, worst_error = mean_image_near(chosen(x_0, selection.worst), chosen(x_t, selection.worst), state)
    assert worst > every + 4 * worst_error
