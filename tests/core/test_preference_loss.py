"""Equation 11 of given errors and rewards: its derivative, its limits, and what carries no preference."""

import math
from types import SimpleNamespace

import pytest
import torch

from train_rlhf_diffusion_sharpening_sdxl import preference_loss

OPTIONS = {
    "beta_dpo": 30.0, "worst_ratio_bound": math.inf, "reward_margin_scale": 1.0, "reward_margin": "inside",
}  # fmt: skip


def pairs(seed=0, count=5, m=3):
    """Errors, reference errors, active steps and rewards of some pairs, float64."""
    generator = torch.Generator().manual_seed(seed)
    errors, reference = torch.rand(2, count, 2, m, generator=generator, dtype=torch.float64)
    active = torch.ones(count, 2, m, dtype=torch.bool)
    active[0, :, 1:] = False  # one pair ends early
    rewards = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return errors, reference, active, rewards


def loss_of(errors, reference, active, rewards, decided=None, **changes):
    decided = torch.ones(len(errors), dtype=torch.bool) if decided is None else decided
    return preference_loss(SimpleNamespace(**{**OPTIONS, **changes}), errors, reference, active, rewards, decided)


@pytest.mark.parametrize(
    "changes",
    [{}, {"reward_margin": "outside"}, {"reward_margin_scale": 0.3}, {"beta_dpo": 900.0}, {"worst_ratio_bound": 5.0}],
)
def test_weights_are_the_derivative_of_the_loss(changes):
    errors, *rest = pairs()
    errors.requires_grad_(True)
    preference = loss_of(errors, *rest, **changes)
    (expected,) = torch.autograd.grad(preference.loss.mean(), errors)
    torch.testing.assert_close(preference.weights, expected, rtol=1e-12, atol=1e-15)


def test_without_margin_it_is_the_diffusion_dpo_loss_of_twice_the_beta():
    """Diffusion-DPO's training script: `-log sigmoid(-beta / 2 * (model_diff - ref_diff))` of one timestep."""
    errors, reference, active, rewards = pairs(m=1)
    ours = loss_of(errors, reference, active, rewards, reward_margin_scale=0.0, beta_dpo=2500.0)
    model_difference, reference_difference = errors[:, 0, 0] - errors[:, 1, 0], reference[:, 0, 0] - reference[:, 1, 0]
    theirs = -torch.nn.functional.logsigmoid(-0.5 * 5000.0 * (model_difference - reference_difference))
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-10, atol=0)


def test_swapping_best_and_worst_flips_the_log_ratio_term():
    errors, reference, active, rewards = pairs()
    ours = loss_of(errors, reference, active, rewards, reward_margin_scale=0.0)
    swapped = loss_of(errors.flip(1), reference.flip(1), active, rewards, reward_margin_scale=0.0)
    torch.testing.assert_close(swapped.logits, -ours.logits, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.loss - swapped.loss, -ours.logits, rtol=1e-12, atol=1e-15)


def test_worse_branch_is_pushed_as_far_as_the_bound_and_no_farther():
    errors, reference, active, rewards = pairs()
    free = loss_of(errors, reference, active, rewards)
    beyond = 30.0 * free.log_ratios[:, 1] <= -2.0
    assert 0 < beyond.sum() < len(beyond)
    bounded = loss_of(errors, reference, active, rewards, worst_ratio_bound=2.0)
    assert not bounded.weights[beyond, 1].any() and (bounded.weights[:, 0] > 0).any(-1).all()
    torch.testing.assert_close(bounded.weights[~beyond], free.weights[~beyond], rtol=1e-12, atol=0)
    expected = 30.0 * free.log_ratios[:, 0] + 2.0 - (rewards[:, 0] - rewards[:, 1])
    torch.testing.assert_close(bounded.logits[beyond], expected[beyond], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bounded.log_ratios, free.log_ratios, rtol=0, atol=0)


def test_small_beta_without_margin_gives_log_2():
    loss = loss_of(*pairs(), beta_dpo=1e-12, reward_margin_scale=0.0).loss
    torch.testing.assert_close(loss, torch.full_like(loss, 2.0).log(), rtol=1e-10, atol=0)


def test_margin_asks_for_more_inside_and_nothing_outside():
    errors, reference, active, rewards = pairs()
    rewards = rewards.sort(1, descending=True).values
    plain, inside, outside = (
        loss_of(errors, reference, active, rewards, **changes)
        for changes in ({"reward_margin_scale": 0.0}, {}, {"reward_margin": "outside"})
    )
    margin = rewards[:, 0] - rewards[:, 1]
    torch.testing.assert_close(inside.logits, plain.logits - margin, rtol=1e-12, atol=0)
    torch.testing.assert_close(outside.loss, plain.loss + margin, rtol=1e-12, atol=0)
    assert torch.equal(outside.weights, plain.weights)
    assert (inside.weights[:, 0] >= plain.weights[:, 0]).all()


def test_undecided_pairs_weigh_nothing_and_count_in_the_divisor():
    errors, reference, active, rewards = pairs()
    rewards[1] = torch.nan  # a branch without a score
    decided = torch.tensor([True, False, True, True, False])
    some, every = loss_of(errors, reference, active, rewards, decided), loss_of(*pairs())
    assert some.weights[~decided].abs().max() == 0
    assert torch.equal(some.weights[decided], every.weights[decided])


def test_inactive_steps_may_hold_anything():
    errors, reference, active, rewards = pairs()
    expected = loss_of(errors, reference, active, rewards)
    spoiled = loss_of(errors.masked_fill(~active, 1e30), reference.masked_fill(~active, -1e30), active, rewards)
    assert torch.equal(spoiled.loss, expected.loss) and torch.equal(spoiled.weights, expected.weights)
    assert expected.weights[~active].abs().max() == 0


def test_reference_of_the_first_step_is_compared_with_all_steps_of_the_model():
    errors, reference, active, rewards = pairs()
    loss = loss_of(errors, reference[..., :1], active, rewards)
    everywhere = loss_of(errors, reference[..., :1].expand_as(reference), active, rewards)
    torch.testing.assert_close(loss.log_ratios, everywhere.log_ratios, rtol=1e-12, atol=1e-15)
