"""Targets, errors and rows of `sharpening.regression`, and what is trained on of a path."""

import math

import pytest
import torch

from sharpening.regression import Regression, masked_mean, squared_error
from sharpening.sdxl import Condition
from sharpening.trajectory import Branches, Model, Schedule, walk_path
from tests.support.objective import SDXL


def test_masked_mean_ignores_inactive_values():
    values = torch.tensor([[1.0, 2.0, math.nan], [3.0, 5.0, 10.0]])
    active = torch.tensor([[True, True, False], [True, True, True]])
    assert masked_mean(values, active).tolist() == [1.5, 6.0]


def test_squared_error_is_the_mse_of_each_row():
    output, target = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    for row, value in enumerate(squared_error(output, target)):
        torch.testing.assert_close(value, torch.nn.functional.mse_loss(output[row], target[row]))


def test_branch_targets_agree_at_the_first_step_and_part_after():
    schedule = Schedule.from_config(SDXL, 25)
    x_0, eps, t = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([800, 300])
    branches = Branches.begin(schedule, x_0, eps, t)
    path = walk_path(lambda rows: Model(lambda x, t: torch.tanh(x)), schedule, branches, 2, 2, outputs=False)
    noise, consistent = (Regression(schedule, kind).targets(branches, path) for kind in ("noise", "consistent"))
    torch.testing.assert_close(noise[:, 0], consistent[:, 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(noise[:, 1], eps)
    # A model that outputs the consistent target lands on the clean latent.
    clean, _ = schedule.clean_and_noise(consistent[:, 1], path.x[:, 1], path.t[:, 1])
    torch.testing.assert_close(clean, x_0, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(noise[:, 1], consistent[:, 1], atol=1e-2)


def test_target_of_a_sample_model_is_the_clean_latent():
    schedule = Schedule.from_config(SDXL, 25, "sample")
    branches = Branches.begin(schedule, torch.full((1, 1), 7.0), torch.ones(1, 1), torch.tensor([500]))
    path = walk_path(lambda rows: Model(lambda x, t: x), schedule, branches, 2, 1, outputs=False)
    assert torch.equal(Regression(schedule).targets(branches, path), torch.full((1, 2, 1), 7.0))


def condition_of(rows):
    return Condition(*(torch.arange(rows)[:, None].expand(-1, size).double() for size in (2, 3, 6)))


@pytest.fixture(params=[("noise", None), ("consistent", None), ("noise", 5.0), ("consistent", 5.0)])
def regression(request):
    return Regression(Schedule.from_config(SDXL, 25), *request.param)


@pytest.fixture
def branches(regression):
    """Branches of 1, 2 and 3 active steps of 3."""
    x_0, eps = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    return Branches.begin(regression.schedule, x_0, eps, torch.tensor([20, 50, 700]))


@pytest.fixture
def path(regression, branches):
    return walk_path(
        lambda rows: Model(lambda x, t: torch.tanh(x)), regression.schedule, branches, 3, 2, outputs=False
    )


def test_rows_are_the_active_states_with_their_branch_and_give_the_weighted_errors(regression, branches, path):
    weights = torch.rand(3, 3, dtype=torch.float64)
    rows = regression.rows(branches, path, condition_of(3), weights)
    assert rows.condition.pooled[:, 0].tolist() == [0, 1, 1, 2, 2, 2] and rows.t.tolist() == [
        20,
        50,
        10,
        700,
        660,
        620,
    ]
    output = torch.sin(path.x)
    expected = torch.where(path.active, weights * regression.errors(branches, path, output), 0).sum()
    torch.testing.assert_close(rows.loss(torch.sin(rows.x)), expected, rtol=1e-6, atol=0)
    assert expected > 0


@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_slices_hold_every_row_once_and_sum_to_the_whole(regression, branches, path, size):
    rows = regression.rows(branches, path, condition_of(3), torch.rand(3, 3, dtype=torch.float64))
    slices = rows.split(size)
    assert [len(part.x) for part in slices] == [size] * (6 // size) + ([6 % size] if 6 % size else [])
    for name in ("x", "t", "target", "weight"):
        assert torch.equal(torch.cat([getattr(part, name) for part in slices]), getattr(rows, name))
    assert torch.equal(torch.cat([part.condition.pooled for part in slices]), rows.condition.pooled)
    total = sum(part.loss(torch.sin(part.x)) for part in slices)
    torch.testing.assert_close(total, rows.loss(torch.sin(rows.x)), rtol=1e-10, atol=0)


def test_min_snr_weighs_errors_by_their_own_timestep(branches, path):
    schedule = Schedule.from_config(SDXL, 25)
    output = torch.sin(path.x)
    plain, weighted = (Regression(schedule, snr_gamma=gamma).errors(branches, path, output) for gamma in (None, 5.0))
    expected = plain * schedule.min_snr_weight(path.t.flatten(), 5.0).view(3, 3)
    torch.testing.assert_close(weighted, expected)
    assert not torch.allclose(weighted, plain)


def test_slices_that_only_other_processes_need_weigh_nothing(regression, branches):
    path = walk_path(lambda rows: Model(lambda x, t: x), regression.schedule, branches, 3, 3, outputs=False)
    rows = regression.rows(branches, path, condition_of(3), torch.ones(3, 3, dtype=torch.double))
    assert len(rows.x) == 6
    alone = rows.split(4)
    agreed = rows.split(4, lambda count: count + 2)
    assert len(alone) == 2 and len(agreed) == 4
    x = torch.ones(())
    assert sum(part.loss(part.x * x) for part in agreed) == sum(part.loss(part.x * x) for part in alone)
    assert all(len(part.x) == len(part.condition.embeds) == 1 and not part.weight.any() for part in agreed[2:])
