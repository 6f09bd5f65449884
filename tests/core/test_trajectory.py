"""The mathematics of `sharpening.trajectory` against hand computation and against diffusers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr

from sharpening.trajectory import (
    Schedule,
    Step,
    begin_samples,
    branch_target,
    classifier_free_guidance,
    ddim_step,
    generate,
    masked_mean,
    score_branches,
    select,
    squared_error,
    walk,
)

SDXL = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "set_alpha_to_one": False,
    "clip_sample": False,
    "prediction_type": "epsilon",
}


def hand_schedule(prediction_type="epsilon", stride=1):
    """Four timesteps whose alphas and sigmas are 3-4-5 fractions: (.8, .6), (.6, .8), (5/13, 12/13), (8/17, 15/17)."""
    squared = torch.tensor([0.8, 0.6, 5 / 13, 8 / 17], dtype=torch.float64) ** 2
    return Schedule(squared, 1.0, prediction_type, stride, torch.tensor([3, 2, 1, 0]))


def test_walk_by_hand():
    # x_1 = 2 with a model that always answers 0.5: x0 = (2 - .8 * .5) / .6 = 8/3, then .8 * 8/3 + .6 * .5 = 73/30;
    # at t = 0: x0 = (73/30 - .6 * .5) / .8 = 8/3 again, because a constant noise leads to the same clean value.
    x = torch.tensor([[2.0]], dtype=torch.float64)
    steps = list(walk(lambda x, t: torch.full_like(x, 0.5), hand_schedule(), x, torch.tensor([1]), 3))
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
    ours = generate(predict, Schedule.from_config(config, 10), start, classifier_free_guidance(unconditional, 4.0))
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_scheduler_of_another_class_does_not_clip_latents():
    euler = {name: value for name, value in SDXL.items() if name != "clip_sample"}
    schedule = Schedule.from_config({**euler, "_class_name": "EulerDiscreteScheduler"}, 25)
    clean, _ = schedule.clean_and_noise(torch.zeros(1, 1), torch.full((1, 1), 10.0), torch.tensor([0]))
    assert clean.item() > 9


def test_states_carry_no_gradient_unless_asked():
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    predict = lambda x, t: weight * x  # noqa: E731
    x = torch.ones(1, 1, dtype=torch.float64)
    detached = list(walk(predict, hand_schedule(), x, torch.tensor([2]), 2))
    assert not detached[1].x.requires_grad
    joint = list(walk(predict, hand_schedule(), x, torch.tensor([2]), 2, detach=False))
    assert joint[1].x.requires_grad
    assert detached[1].x.item() == joint[1].x.item()


def test_masked_mean_ignores_inactive_values():
    values = torch.tensor([[1.0, 2.0, math.nan], [3.0, 5.0, 10.0]])
    active = torch.tensor([[True, True, False], [True, True, True]])
    assert masked_mean(values, active).tolist() == [1.5, 6.0]


def test_selection_by_hand():
    rewards = torch.tensor([[[1.0, 2.0], [5.0, 0.0], [0.0, 0.0]], [[9.0, 99.0], [8.0, -99.0], [9.0, 0.0]]])
    active = torch.tensor([[[True, True]] * 3, [[True, False]] * 3])
    chosen = select(rewards, active)
    assert chosen.branch_reward.tolist() == [[1.5, 2.5, 0.0], [9.0, 8.0, 9.0]]
    assert chosen.best.tolist() == [1, 0]
    assert chosen.worst.tolist() == [2, 1]
    assert chosen.tied.tolist() == [False, False]
    assert select(torch.ones(1, 3, 2), torch.ones(1, 3, 2, dtype=torch.bool)).tied.tolist() == [True]


def test_branch_without_a_score_is_never_chosen():
    nan = float("nan")
    rewards = torch.tensor(
        [
            [[9.0, nan], [1.0, 2.0], [3.0, 4.0]],  # the best-looking branch lacks one score
            [[-9.0, nan], [1.0, 2.0], [3.0, 4.0]],  # so does the worst-looking one
            [[nan, nan], [-7.0, -7.0], [nan, 0.0]],  # one branch left
            [[nan, nan], [nan, 1.0], [1.0, nan]],  # none left
            [[1.0, nan], [2.0, nan], [0.5, nan]],  # what is not active may be anything
        ]
    )
    active = torch.ones(5, 3, 2, dtype=torch.bool)
    active[4, :, 1] = False
    chosen = select(rewards, active)
    assert chosen.scored.tolist() == [[False, True, True]] * 2 + [[False, True, False], [False] * 3, [True] * 3]
    assert chosen.best[[0, 1, 2, 4]].tolist() == [2, 2, 1, 1]
    assert chosen.worst[[0, 1, 2, 4]].tolist() == [1, 1, 1, 2]
    assert chosen.tied.tolist() == [False, False, True, False, False]


def test_permuting_prompts_permutes_choices():
    rewards = torch.randn(4, 3, 5) + torch.arange(4).view(4, 1, 1) * 100  # one prompt outbids all others
    active = torch.ones(4, 3, 5, dtype=torch.bool)
    permutation = torch.tensor([2, 0, 3, 1])
    before, after = select(rewards, active), select(rewards[permutation], active)
    assert torch.equal(after.best, before.best[permutation])
    assert torch.equal(after.worst, before.worst[permutation])
    assert (before.branch_reward.argmax(1) == before.best).all()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
def test_scoring_in_slices_equals_scoring_at_once_and_never_mixes_prompts(batch_size):
    schedule = Schedule.from_config(SDXL, 25)
    prompts_of_rows = torch.arange(12) // 3
    x_t, t = torch.randn(12, 2, 2, 2), torch.tensor([0, 30, 79, 500]).repeat_interleave(3)
    seen = []

    def model(rows):
        scale = (prompts_of_rows[rows] + 1).view(-1, 1, 1, 1) / 10  # a prompt's own model
        return lambda x, t: scale * x, None

    def judge(x0_hat, rows):
        seen.extend(rows.tolist())
        verdict = x0_hat.mean((1, 2, 3)) + prompts_of_rows[rows], {"mean": x0_hat.mean((1, 2, 3))}
        return lambda: verdict

    scores = score_branches(model, judge, schedule, x_t, t, 3, batch_size, keep_path=True)
    whole = score_branches(model, judge, schedule, x_t, t, 3, 12)
    torch.testing.assert_close(scores.rewards, whole.rewards)
    torch.testing.assert_close(scores.last_estimate, whole.last_estimate)
    torch.testing.assert_close(scores.components["mean"], whole.components["mean"], equal_nan=True)
    assert torch.equal(scores.components["mean"].isnan(), ~scores.active)
    assert torch.equal(torch.stack([point.active for point in scores.path], 1), scores.active) and whole.path == []
    assert scores.active.sum(1).tolist() == [1] * 6 + [2] * 3 + [3] * 3
    assert len(seen) == 2 * int(scores.active.sum())  # inactive steps are never decoded or judged
    for row in range(12):
        scale = (row // 3 + 1) / 10
        alone = list(walk(lambda x, t, s=scale: s * x, schedule, x_t[row : row + 1], t[row : row + 1], 3))
        for k, point in enumerate(alone):
            kept = scores.path[k].rows(torch.tensor([row]))
            if point.active:
                torch.testing.assert_close(kept, point)
            expected = float(point.x0_hat.mean()) + row // 3 if point.active else 0.0
            assert scores.rewards[row, k].item() == pytest.approx(expected, abs=1e-5)


def test_no_reward_is_waited_for_before_every_step_is_walked():
    schedule, events = Schedule.from_config(SDXL, 25), []

    def predict(x, t):
        events.append("forward")
        return x

    def judge(latents, rows):
        events.append("begin")
        return lambda: events.append("wait") or (latents.mean((1, 2, 3)), {})

    x_t, t = torch.randn(4, 2, 2, 2), torch.full((4,), 500)
    scores = score_branches(lambda rows: (predict, None), judge, schedule, x_t, t, 3, batch_size=2)
    assert events == ["forward", "begin"] * 6 + ["wait"] * 6
    events.clear()
    samples = begin_samples(judge, scores.last_estimate, torch.arange(4), batch_size=2)()
    assert events == ["begin"] * 2 + ["wait"] * 2
    torch.testing.assert_close(samples.rewards[:, 0], scores.rewards[:, 2])


def test_branch_targets_agree_at_the_first_step_and_part_after():
    schedule = Schedule.from_config(SDXL, 25)
    x_0, eps, t = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([800, 300])
    steps = list(walk(lambda x, t: torch.tanh(x), schedule, schedule.add_noise(x_0, eps, t), t, 2))
    targets = [[branch_target(schedule, step, x_0, eps, kind) for step in steps] for kind in ("noise", "consistent")]
    torch.testing.assert_close(targets[0][0], targets[1][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(targets[0][1], eps)
    # A model that outputs the consistent target lands on the clean latent.
    clean, _ = schedule.clean_and_noise(targets[1][1], steps[1].x, steps[1].t)
    torch.testing.assert_close(clean, x_0, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(targets[0][1], targets[1][1], atol=1e-2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weight_equals_the_diffusers_recipe(prediction_type):
    schedule = Schedule.from_config(SDXL, 25, prediction_type)
    t = torch.tensor([0, 10, 200, 999])
    snr = compute_snr(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), t)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    expected = torch.stack([snr, torch.full_like(snr, 5.0)]).amin(0) / divisor
    torch.testing.assert_close(schedule.min_snr_weight(t, 5.0), expected, rtol=1e-4, atol=1e-6)


def test_squared_error_is_the_mse_of_each_row():
    output, target = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    for row, value in enumerate(squared_error(output, target)):
        torch.testing.assert_close(value, torch.nn.functional.mse_loss(output[row], target[row]))


def test_guidance_extrapolates_from_the_unconditional_output():
    guide = classifier_free_guidance(lambda x, t: torch.zeros_like(x), 5.0)
    assert guide(torch.ones(2), torch.ones(2), torch.zeros(2)).tolist() == [5.0, 5.0]


def test_target_of_a_sample_model_is_the_clean_latent():
    step = Step(torch.ones(1, 1), torch.tensor([1]), None, None, torch.tensor([True]))
    assert branch_target(hand_schedule("sample"), step, torch.full((1, 1), 7.0), torch.ones(1, 1), "noise").item() == 7
