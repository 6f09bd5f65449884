"""`--reward_scaling spread` by itself: what a component is divided by, what is then selected, gaps and ties."""

import pytest
import torch

from sharpening.rewards.spec import Component
from sharpening.running.curves import Means
from sharpening.running.reward_scaling import DECAY, RewardScaling
from sharpening.selection import Scores, select

SMALL, LARGE = "small", "large"


def components(small=1.0, large=1.0):
    return [Component(SMALL, small, SMALL), Component(LARGE, large, LARGE)]


def scores_of(small, large, weights=(1.0, 1.0)):
    """Scores of (R, m) component values, summed as a reward sums them; every step is active."""
    small, large = (torch.as_tensor(values, dtype=torch.float32).reshape(len(values), -1) for values in (small, large))
    active = torch.ones(small.shape, dtype=torch.bool)
    return Scores(weights[0] * small + weights[1] * large, {SMALL: small, LARGE: large}, active, torch.zeros(1))


def scaling(kind="spread", kept=None, **weights):
    return RewardScaling(kind, components(**weights), None, kept)


def means():
    return Means(torch.device("cpu"))


def drawn(prompts=400, n=4, seed=0):
    """Two independent rewards of prompts of differing difficulty, one of which spreads a thousand times more."""
    generator = torch.Generator().manual_seed(seed)
    small, large = torch.randn(2, prompts, n, generator=generator)
    of_prompt = torch.randn(2, prompts, 1, generator=generator)
    return (small + 5 * of_prompt[0]).flatten(), (1000 * (large + 5 * of_prompt[1])).flatten()


def how_good(chosen, values, n=4):
    """How many standard deviations within prompts the chosen branches are above the mean of their prompt."""
    values = values.view(-1, n)
    deviation = (values - values.mean(1, keepdim=True)) / values.std(1, correction=0, keepdim=True)
    return float(deviation.gather(1, chosen[:, None]).mean())


def test_selection_follows_both_of_two_rewards_of_scale_1_and_1000():
    """The best of 4 is 1.3 deviations above the mean in what decides alone, 0.8 in each of two that decide alike."""
    small, large = drawn()
    scores = scores_of(small, large)
    as_it_is = select(scores.rewards, scores.active, 4)
    assert abs(how_good(as_it_is.best, small)) < 0.1 and how_good(as_it_is.best, large) > 1.1
    scaled = scaling().apply(scores, 4, means())
    both = select(scaled.rewards, scaled.active, 4)
    for values in (small, large):
        assert 0.7 < how_good(both.best, values) < 0.95
        assert -0.95 < how_good(both.worst, values) < -0.7
    assert scaled.components is scores.components  # logged as they are


def test_weights_mean_importance():
    small, large = drawn()
    scores = scaling(small=3.0, large=1.0).apply(scores_of(small, large), 4, means())
    best = select(scores.rewards, scores.active, 4).best
    assert how_good(best, small) > 1.05 > 0.55 > how_good(best, large) > 0.25
    scores = scaling(small=1.0, large=-1.0).apply(scores_of(small, large), 4, means())
    best = select(scores.rewards, scores.active, 4).best
    assert how_good(best, small) > 0.7 and how_good(best, large) < -0.7


def test_off_by_default_it_changes_nothing_and_keeps_nothing():
    scores, kept = scores_of(*drawn()), {}
    assert scaling("none", kept).apply(scores, 4, means()) is scores and kept == {}


def pooled(values, n):
    """Standard deviation within prompts of steps (S, P * n), the last of which counts most."""
    squares = degrees = 0.0
    for step in values.double():
        of_prompt = step.view(-1, n)
        squares = DECAY * squares + float(of_prompt.var(1, correction=1).sum() * (n - 1))
        degrees = DECAY * degrees + of_prompt.shape[0] * (n - 1)
    return (squares / degrees) ** 0.5


def test_it_is_a_running_deviation_within_prompts_and_is_logged(no_accelerator):
    generator = torch.Generator().manual_seed(3)
    small = torch.randn(5, 12, generator=generator) * torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])[:, None]
    large = torch.randn(5, 12, generator=generator) + torch.arange(4).repeat_interleave(3) * 100
    running, kept = scaling(), []
    for step in range(5):
        curves = means()
        scores = running.apply(scores_of(small[step], large[step]), 3, curves)
        expected = [pooled(values[: step + 1], 3) for values in (small, large)]
        line = curves.reduce(no_accelerator)
        assert [line["reward/scale/small"], line["reward/scale/large"]] == pytest.approx(expected, rel=1e-9)
        total = small[step] / expected[0] + large[step] / expected[1]
        torch.testing.assert_close(scores.rewards[:, 0], total, rtol=1e-5, atol=1e-5)
        kept.append(scores.rewards)
    resumed = scaling(kept={})
    for step in range(5):
        if step == 3:  # as a checkpoint is read back, into a dictionary that may hold more
            resumed = scaling(kept={"other": 1, **resumed.kept})
        assert torch.equal(resumed.apply(scores_of(small[step], large[step]), 3, means()).rewards, kept[step])


@pytest.fixture
def no_accelerator():
    from types import SimpleNamespace

    return SimpleNamespace(num_processes=1)


def test_branches_without_a_score_and_steps_that_are_not_active_say_nothing():
    small = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [5.0, 6.0], [7.0, 7.0]])
    active = torch.tensor([[True, True], [True, True], [True, False], [True, False]])
    scores = Scores(torch.zeros(4, 2), {SMALL: small, LARGE: torch.ones(4, 2)}, active, torch.zeros(1))
    running = scaling()
    rewards = running.apply(scores, 2, means()).rewards
    # Only the second prompt has two scores: 5 and 7, of variance 2 about their mean.
    assert running.kept["spread"] == {SMALL: [2.0, 1.0], LARGE: [0.0, 2.0]}
    expected = small / 2**0.5 + 1
    assert rewards[1, 1].isnan() and rewards[2:, 1].tolist() == [0, 0]
    torch.testing.assert_close(rewards[[0, 0, 1, 2, 3], [0, 1, 0, 0, 0]], expected[[0, 0, 1, 2, 3], [0, 1, 0, 0, 0]])


def test_what_has_not_differed_yet_is_not_divided():
    running = scaling()
    small, flat = torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.full((4,), 7.0)
    rewards = running.apply(scores_of(small, flat), 2, means()).rewards
    torch.testing.assert_close(rewards[:, 0], small / (2.5 / 2) ** 0.5 + 7)
    nothing = torch.full((4,), torch.nan)
    assert scaling().apply(scores_of(nothing, nothing), 2, means()).rewards.isnan().all()


@pytest.mark.parametrize("n", [3, 7, 11])
def test_component_that_differs_by_rounding_alone_is_not_divided(n):
    generator, running = torch.Generator().manual_seed(n), scaling()
    for _ in range(20):
        small = torch.randn(5 * n, 3, generator=generator)
        flat = torch.randn(5, 1, 3, generator=generator).expand(-1, n, -1).flatten(0, 1) + 20  # alike in all branches
        scores = running.apply(
            scores_of(small, flat * (1 + 1e-7 * torch.randn(5 * n, 3, generator=generator))), n, means()
        )
        assert (scores.rewards - flat).abs().max() < 10
