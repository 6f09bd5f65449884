"""The mathematics of `sharpening.trajectory` against hand computation and against diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr

from sharpening.trajectory import (
    Branches,
    Model,
    Path,
    Schedule,
    classifier_free_guidance,
    ddim_step,
    generate,
    outputs_through_sampler,
    walk,
    walk_path,
)
from tests.support.objective import SDXL


def hand_schedule(prediction_type="epsilon", stride=1):
    """Four timesteps whose alphas and sigmas are 3-4-5 fractions: (.8, .6), (.6, .8), (5/13, 12/13), (8/17, 15/17)."""
    squared = torch.tensor([0.8, 0.6, 5 / 13, 8 / 17], dtype=torch.float64) ** 2
    return Schedule(squared, 1.0, prediction_type, stride, torch.tensor([3, 2, 1, 0]))


def test_walk_by_hand():
    # x_1 = 2 with a model that always answers 0.5: x0 = (2 - .8 * .5) / .6 = 8/3, then .8 * 8/3 + .6 * .5 = 73/30;
    # at t = 0: x0 = (73/30 - .6 * .5) / .8 = 8/3 again, because a constant noise leads to the same clean value.
    x = torch.tensor([[2.0]], dtype=torch.float64)
    steps = list(walk(Model(lambda x, t: torch.full_like(x, 0.5)), hand_schedule(), x, torch.tensor([1]), 3))
    assert [step.x.item() for step in steps] == pytest.approx([2, 73 / 30, 8 / 3])
    assert [step.t.item() for step in steps] == [1, 0, 0]
    assert [step.active.item() for step in steps] == [True, True, False]
    assert steps[0].x0_hat.item() == pytest.approx(8 / 3)
    assert steps[1].x0_hat.item() == pytest.approx(8 / 3)


@pytest.mark.parametrize(
    ("prediction_type", "clean", "noise"),
    [
        ("epsilon", (2 - 0.8 * 0.5) / 0.6, 0.5),
        ("v_prediction", 0.6 * 2 - 0.8 * 0.5, 0.8 * 2 + 0.6 * 0.5),
        ("sample", 0.5, (2 - 0.6 * 0.5) / 0.8),
    ],
)
def test_clean_estimate_by_hand(prediction_type, clean, noise):
    schedule = hand_schedule(prediction_type)
    x, output = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64)
    x0_hat, eps_hat = schedule.clean_and_noise(output, x, torch.tensor([1]))
    assert x0_hat.item() == pytest.approx(clean)
    assert eps_hat.item() == pytest.approx(noise)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_is_the_output_that_recovers_clean_and_noise(prediction_type):
    schedule = Schedule.from_config(SDXL, 25, prediction_type)
    x_0, eps, t = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 39, 500, 999])
    x_t = schedule.add_noise(x_0, eps, t)
    clean, noise = schedule.clean_and_noise(schedule.target(x_0, eps, t), x_t, t)
    torch.testing.assert_close(clean, x_0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(noise, eps, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize(("infer_steps", "offset"), [(25, 1), (50, 0), (7, 1)])
def test_batched_ddim_step_equals_diffusers_row_by_row(
    spacing, prediction_type, set_alpha_to_one, infer_steps, offset
):
    config = {
        **SDXL,
        "timestep_spacing": spacing,
        "prediction_type": prediction_type,
        "set_alpha_to_one": set_alpha_to_one,
        "steps_offset": offset,
    }
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(infer_steps)
    schedule = Schedule.from_config(config, infer_steps)
    assert torch.equal(schedule.timesteps, scheduler.timesteps)
    # The sampler's own grid, and timesteps off the grid, near both ends included.
    t = torch.cat([scheduler.timesteps, torch.tensor([0, 1, 39, 40, 41, 333, 999])])
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, len(t), 4, 2, 2, generator=generator)
    clean, noise = schedule.clean_and_noise(output, x, t)
    moved = ddim_step(schedule, clean, noise, t)
    for row, timestep in enumerate(t.tolist()):
        expected = scheduler.step(output[row], timestep, x[row])
        torch.testing.assert_close(clean[row], expected.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moved[row], expected.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_generate_equals_a_diffusers_sampling_loop(spacing):
    config = {**SDXL, "timestep_spacing": spacing}
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(10)
    predict = lambda x, t: torch.tanh(x) * (1 + t.view(-1, 1) / 1000)  # noqa: E731
    unconditional = lambda x, t: torch.sin(x)  # noqa: E731
    x = start = torch.randn(3, 5)
    for timestep in scheduler.timesteps:
        t = timestep.expand(3)
        guided = unconditional(x, t) + 4 * (predict(x, t) - unconditional(x, t))
        x = scheduler.step(guided, timestep, x).prev_sample
    model = Model(predict, classifier_free_guidance(unconditional, 4.0))
    ours = generate(model, Schedule.from_config(config, 10), start)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_scheduler_of_another_class_does_not_clip_latents():
    euler = {name: value for name, value in SDXL.items() if name != "clip_sample"}
    schedule = Schedule.from_config({**euler, "_class_name": "EulerDiscreteScheduler"}, 25)
    clean, _ = schedule.clean_and_noise(torch.zeros(1, 1), torch.full((1, 1), 10.0), torch.tensor([0]))
    assert clean.item() > 9


def test_states_carry_no_gradient_unless_asked():
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    model = Model(lambda x, t: weight * x)
    x = torch.ones(1, 1, dtype=torch.float64)
    detached = list(walk(model, hand_schedule(), x, torch.tensor([2]), 2))
    assert not detached[1].x.requires_grad
    joint = list(walk(model, hand_schedule(), x, torch.tensor([2]), 2, detach=False))
    assert joint[1].x.requires_grad
    assert detached[1].x.item() == joint[1].x.item()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weight_equals_the_diffusers_recipe(prediction_type):
    schedule = Schedule.from_config(SDXL, 25, prediction_type)
    t = torch.tensor([0, 10, 200, 999])
    snr = compute_snr(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), t)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = torch.stack([snr, torch.full_like(snr, 5.0)]).amin(0) / divisor
    torch.testing.assert_close(schedule.min_snr_weight(t, 5.0), expected, rtol=1e-4, atol=1e-6)


def test_guidance_extrapolates_from_the_unconditional_output():
    guide = classifier_free_guidance(lambda x, t: torch.zeros_like(x), 5.0)
    assert guide(torch.ones(2), torch.ones(2), torch.zeros(2)).tolist() == [5.0, 5.0]


def walked(steps, batch_size=2, outputs=False):
    """The states of branches that end early, late and not at all, and the branches and model they came from."""
    schedule, generator = Schedule.from_config(SDXL, 25), torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    branches = Branches.begin(schedule, x_0, eps, torch.tensor([0, 39, 40, 79, 900]))
    scale = torch.arange(1, 6, dtype=torch.float64)[:, None] / 10  # a model of each row's own
    seen = []

    def model_of(rows):
        return Model(lambda x, t: seen.append(len(x)) or torch.tanh(scale[rows] * x))

    path = walk_path(model_of, schedule, branches, steps, batch_size, outputs)
    return path, branches, schedule, model_of, seen


def test_branches_begin_at_their_noisy_latents_and_rows_keep_together():
    _, branches, schedule, _, _ = walked(1)
    assert torch.equal(branches.x_t, schedule.add_noise(branches.x_0, branches.eps, branches.t))
    some = branches.rows(torch.tensor([4, 1]))
    assert some.t.tolist() == [900, 39]
    assert all(torch.equal(part, whole[[4, 1]]) for part, whole in zip(some, branches, strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_states_are_those_of_the_walk_and_the_last_costs_no_forward(batch_size):
    path, branches, schedule, model_of, seen = walked(3, batch_size)
    assert sum(seen) == 5 * 2
    assert path.active.tolist() == [[True] + [False] * 2, [True] + [False] * 2] + [[True, True, False]] * 2 + [
        [True] * 3
    ]
    assert path.output is None
    for row in range(5):
        index = torch.tensor([row])
        part = branches.rows(index)
        for k, point in enumerate(walk(model_of(index), schedule, part.x_t, part.t, 3)):
            assert path.active[row, k] == point.active and path.t[row, k] == point.t
            if point.active:
                torch.testing.assert_close(path.x[row, k], point.x[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_with_outputs_the_last_state_costs_a_forward_too_and_all_are_kept(steps):
    path, _, _, model_of, seen = walked(steps, outputs=True)
    assert sum(seen) == 5 * steps
    without = walked(steps)[0]
    assert torch.equal(path.active, without.active)
    assert torch.equal(path.x[path.active], without.x[path.active])
    for row in range(5):
        output = model_of(torch.tensor([row])).predict(path.x[row], path.t[row])
        torch.testing.assert_close(path.output[row], output, rtol=1e-12, atol=1e-12)


def test_states_of_one_step_need_no_model():
    path, branches, _, _, seen = walked(1)
    assert seen == []
    assert torch.equal(path.x[:, 0], branches.x_t) and torch.equal(path.t[:, 0], branches.t) and path.active.all()


def test_rows_and_first_steps_of_a_path():
    x, t = torch.randn(3, 4, 2), torch.arange(12).view(3, 4)
    path = Path(x, t, t > 5, x + 1)
    some = path.rows(torch.tensor([2, 0])).first(2)
    assert torch.equal(some.x, x[[2, 0], :2]) and torch.equal(some.output, x[[2, 0], :2] + 1)
    assert some.t.tolist() == [[8, 9], [0, 1]] and some.active.tolist() == [[True, True], [False, False]]
    assert Path(x, t, t > 5).rows(torch.tensor([1])).first(1).output is None


def test_outputs_through_the_sampler_are_those_of_the_walk_and_reach_every_earlier_step():
    schedule, weight = Schedule.from_config(SDXL, 25), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, dtype=torch.float64)
    branches = Branches.begin(schedule, x, x, torch.tensor([900, 500]))
    model = Model(lambda x, t: weight * x)
    outputs = outputs_through_sampler(model, schedule, branches, 3)
    detached = torch.stack([point.output for point in walk(model, schedule, branches.x_t, branches.t, 3)], 1)
    torch.testing.assert_close(outputs, detached)
    (through,), (cut) = (torch.autograd.grad(part[:, 2].sum(), weight) for part in (outputs, detached))
    assert abs(float(through - cut[0])) > 1e-3
