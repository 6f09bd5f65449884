"""The policy gradient of the RLHF script against DDPO's objective, written with diffusers and torch.distributions."""

import pytest
import torch
from diffusers import DDIMScheduler

from sharpening import sdxl
from sharpening.trajectory import Schedule, advantages, sample_path, select
from tests.support.objective import double_precision, gradient, problem
from tiny_world.make_tiny_sdxl import make_pipeline
from train_rlhf_diffusion_sharpening_sdxl import policy_losses

STEPS = 5


@pytest.fixture(scope="module")
def pipeline():
    return double_precision(make_pipeline(seed=0))


def scheduler_of(config, prediction_type):
    scheduler = DDIMScheduler.from_config(config, prediction_type=prediction_type, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(STEPS)
    return scheduler


def schedule_of(config, prediction_type):
    ours = Schedule.from_config(config, STEPS, prediction_type)
    alphas = ours.alphas_cumprod.double()
    return Schedule(alphas, float(alphas[0]), prediction_type, ours.stride, ours.timesteps)


def drawn(rows, size=4):
    generator = torch.Generator().manual_seed(2)
    noises = torch.randn(rows, STEPS - 1, 4, size, size, generator=generator, dtype=torch.float64)
    kept = torch.stack([torch.randperm(STEPS - 1, generator=generator) for _ in range(rows)])
    return noises, kept


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("m", [1, 3])
def test_gradient_is_that_of_the_log_densities_of_the_sampled_steps(pipeline, prediction_type, m):
    config = pipeline.scheduler.config
    scheduler, schedule = scheduler_of(config, prediction_type), schedule_of(config, prediction_type)
    unet, condition, _, x, _ = problem(pipeline, 2, 2, torch.float64)  # two prompts, two samples each
    condition = condition.rows(torch.arange(4) // 2)
    noises, kept = drawn(4)
    kept = kept[:, :m]
    advantage = torch.tensor([1.0, -1.0, 0.3, -0.7], dtype=torch.float64)

    def predict(x, t):
        return sdxl.predict_output(unet, x, t, condition)

    def model_of(rows):
        return (lambda x, t: sdxl.predict_output(unet, x, t, condition.rows(rows))), None

    with torch.no_grad():
        x_0, path = sample_path(predict, schedule, x, noises, kept)
    unet.zero_grad(set_to_none=False)
    total = 0.0
    for loss in policy_losses(model_of, schedule, path, advantage, 3):  # a slice of three, one of one
        loss.backward()
        total += float(loss.detach())
    ours = gradient(unet).clone()

    unet.zero_grad()
    objective, state = 0.0, x
    for step, timestep in enumerate(scheduler.timesteps.tolist()):
        output = predict(state, torch.full((4,), timestep))
        if step == STEPS - 1:
            state = scheduler.step(output, timestep, state).prev_sample
            break
        mean = scheduler.step(output, timestep, state, eta=1.0, variance_noise=torch.zeros_like(state)).prev_sample
        variance = scheduler._get_variance(timestep, timestep - scheduler.config.num_train_timesteps // STEPS)
        reached = scheduler.step(output, timestep, state, eta=1.0, variance_noise=noises[:, step]).prev_sample.detach()
        log_density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(reached).mean((1, 2, 3))
        taken = (kept == step).any(1)
        objective = objective - (advantage * log_density * taken).sum() / (4 * m)
        state = reached
    objective.backward()
    assert (state - x_0).abs().max() < 1e-9 * x_0.abs().max()
    assert gradient(unet).norm() > 0
    assert (ours - gradient(unet)).norm() <= 1e-9 * gradient(unet).norm()


def test_a_path_keeps_the_steps_it_was_told_to(pipeline):
    schedule = schedule_of(pipeline.scheduler.config, "epsilon")
    noises, kept = drawn(3)
    states = []

    def predict(x, t):
        states.append(x)
        return 0.1 * x

    x = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    _, path = sample_path(predict, schedule, x, noises, kept)
    for k, transition in enumerate(path):
        for row in range(3):
            assert torch.equal(transition.x[row], states[kept[row, k]][row])
            assert transition.t[row] == schedule.timesteps[kept[row, k]]
            alpha, sigma = schedule.alpha_sigma(transition.t[row : row + 1], transition.x[row : row + 1])
            whole = alpha * transition.x_0[row] + sigma * transition.eps[row]
            torch.testing.assert_close(whole[0], transition.x[row], rtol=1e-12, atol=1e-12)


def test_policy_gradient_ascends_the_reward():
    """On a Gaussian toy whose reward is known: the expected gradient is the derivative of the expected reward.

    The model outputs a constant theta as its clean estimate; samples are the more to its side the larger theta is.
    """
    config = make_pipeline(seed=0).scheduler.config
    schedule = schedule_of(config, "sample")
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def predict(x, t):
        return theta.expand_as(x)

    rows, n = 4000, 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, 1, 1, generator=generator, dtype=torch.float64)
    noises = torch.randn(rows, STEPS - 1, 1, 1, 1, generator=generator, dtype=torch.float64)
    kept = torch.arange(STEPS - 1).expand(rows, -1)
    with torch.no_grad():
        _, path = sample_path(predict, schedule, x, noises, kept)
        # Not the clean latent: it is the model's constant but for little noise.
        reached = path[-1].x.flatten()
    rewards = reached.view(-1, n, 1).float()
    advantage = advantages(select(rewards, torch.ones_like(rewards, dtype=torch.bool))).flatten().double()
    sum(policy_losses(lambda rows: (predict, None), schedule, path, advantage, 999)).backward()
    assert theta.grad < -0.1  # descent raises theta, hence the reward


def test_advantages_are_standardised_by_prompt_and_know_ties_and_gaps():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0], [1.0, torch.nan, 3.0, torch.nan]])[..., None]
    result = advantages(select(rewards, torch.ones_like(rewards, dtype=torch.bool)))
    first = rewards[0, :, 0]
    torch.testing.assert_close(result[0], (first - first.mean()) / first.std(correction=0))
    assert torch.equal(result[1], torch.zeros(4))
    torch.testing.assert_close(result[2], torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    nothing = torch.full((1, 2, 1), torch.nan)
    assert torch.equal(advantages(select(nothing, torch.ones(1, 2, 1, dtype=torch.bool))), torch.zeros(1, 2))
