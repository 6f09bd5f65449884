"""DDPO: its policy gradient against the objective written with diffusers and torch.distributions; its paths."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler

from baselines.ddpo import advantages
from sharpening import sdxl
from sharpening.draws import draw_paths
from sharpening.regression import Rows
from sharpening.selection import select
from sharpening.stochastic import sample_paths
from sharpening.trajectory import Model, Schedule
from tests.baselines import literal
from tests.support.objective import double_precision, gradient, problem
from tiny_world.make_tiny_sdxl import make_pipeline

STEPS = 5


@pytest.fixture
def method():
    return "DDPO"


@pytest.fixture(scope="module")
def pipeline():
    return double_precision(make_pipeline(seed=0))


def scheduler_of(config, prediction_type, steps=STEPS):
    scheduler = DDIMScheduler.from_config(config, prediction_type=prediction_type, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
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


def log_density(scheduler, output, timestep, state, reached):
    """log p(reached | state), a mean over the elements, of the sampler's own Gaussian step."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    mean = scheduler.step(output, timestep, state, eta=1.0, variance_noise=torch.zeros_like(state)).prev_sample
    variance = scheduler._get_variance(timestep, timestep - stride)
    return torch.distributions.Normal(mean, variance.sqrt()).log_prob(reached).mean((1, 2, 3))


# --------------------------------------------------------------------------------------------------------- the paths


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

    with torch.no_grad():
        x_0, path = sample_paths(Model(predict), schedule, x, noises, kept)
    weight = advantage[:, None] * path.precision / (4 * m)
    of_rows = condition.rows(torch.arange(4).repeat_interleave(m))
    unet.zero_grad(set_to_none=False)
    x_k, t, target = (part.flatten(0, 1) for part in path[:3])
    for rows in Rows(x_k, t, of_rows, target, weight.flatten()).split(3):
        rows.loss(sdxl.predict_output(unet, rows.x, rows.t, rows.condition)).backward()
    ours = gradient(unet).clone()

    unet.zero_grad()
    objective, state = 0.0, x
    for step, timestep in enumerate(scheduler.timesteps.tolist()):
        output = predict(state, torch.full((4,), timestep))
        if step == STEPS - 1:
            state = scheduler.step(output, timestep, state).prev_sample
            break
        reached = scheduler.step(output, timestep, state, eta=1.0, variance_noise=noises[:, step]).prev_sample.detach()
        taken = (kept == step).any(1)
        density = log_density(scheduler, output, timestep, state, reached)
        objective = objective - (advantage * density * taken).sum() / (4 * m)
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
    _, path = sample_paths(Model(predict), schedule, x, noises, kept)
    assert path.x.shape == path.target.shape == (3, STEPS - 1, 4, 4, 4)
    assert path.t.shape == path.precision.shape == (3, STEPS - 1)
    for row in range(3):
        for k in range(STEPS - 1):
            assert torch.equal(path.x[row, k], states[kept[row, k]][row])
            assert path.t[row, k] == schedule.timesteps[kept[row, k]]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_model_that_outputs_the_target_expects_the_state_that_was_reached(pipeline, prediction_type):
    scheduler = scheduler_of(pipeline.scheduler.config, prediction_type)
    schedule = schedule_of(pipeline.scheduler.config, prediction_type)
    noises, _ = drawn(2)
    states = []

    def predict(x, t):
        states.append(x)
        return (0.3 * x).tanh()

    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    _, path = sample_paths(Model(predict), schedule, x, noises, torch.arange(STEPS - 1).expand(2, -1))
    nothing = torch.zeros_like(x)
    for k, timestep in enumerate(schedule.timesteps.tolist()[:-1]):
        target, state = path.target[:, k], path.x[:, k]
        expected = scheduler.step(target, timestep, state, eta=1.0, variance_noise=nothing).prev_sample
        torch.testing.assert_close(expected, states[k + 1], rtol=1e-9, atol=1e-9)


def test_policy_gradient_ascends_the_reward():
    """On a Gaussian toy whose reward is known: the expected gradient is the derivative of the expected reward.

    The model outputs a constant theta as its clean estimate; samples are the more to its side the larger theta is.
    """
    schedule = schedule_of(make_pipeline(seed=0).scheduler.config, "sample")
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def predict(x, t):
        return theta.expand_as(x)

    rows, n = 4000, 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, 1, 1, generator=generator, dtype=torch.float64)
    noises = torch.randn(rows, STEPS - 1, 1, 1, 1, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        _, path = sample_paths(Model(predict), schedule, x, noises, torch.arange(STEPS - 1).expand(rows, -1))
        # Not the clean latent: it is the model's constant but for little noise.
        rewards = path.x[:, -1].view(-1, n, 1).float()
    advantage = advantages(select(rewards.flatten(0, 1), torch.ones(rows, 1, dtype=torch.bool), n)).flatten().double()
    weight = advantage[:, None] * path.precision / (rows * (STEPS - 1))
    error = (predict(path.x, path.t) - path.target).square().flatten(2).mean(2)
    (weight * error).sum().backward()
    assert theta.grad < -0.1  # descent raises theta, hence the reward


def test_advantages_are_standardised_by_prompt_and_know_ties_and_gaps():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0], [1.0, torch.nan, 3.0, torch.nan]])
    result = advantages(select(rewards.view(-1, 1), torch.ones(12, 1, dtype=torch.bool), 4))
    first = rewards[0]
    torch.testing.assert_close(result[0], (first - first.mean()) / first.std(correction=0))
    assert torch.equal(result[1], torch.zeros(4))
    torch.testing.assert_close(result[2], torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    nothing = torch.full((2, 1), torch.nan)
    assert torch.equal(advantages(select(nothing, torch.ones(2, 1, dtype=torch.bool), 2)), torch.zeros(1, 2))


def test_advantages_are_cut_at_five():
    rewards = torch.tensor([100.0] + [0.0] * 49)
    result = advantages(select(rewards[:, None], torch.ones(50, 1, dtype=torch.bool), 50))
    assert result.max() == 5 and result.min() > -1


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.usefixtures("no_result", "in_double")
def test_paths_prompts_and_rewards_stay_together_across_slices(train, flags, world, prompts, seen, tmp_path):
    """Slices of 3 generate 8 samples of 2 prompts, slices of 5 train on 2 steps of each; the reward sees slices of 5.

    The gradient of the second step equals that of `-A log p` on the path that the hooks saw. The samples of its first
    prompt all earn the same: they have no advantage and count in the mean.
    """
    n, m, steps = 4, 2, 4
    rows, draws = literal.drawn(1, 4, 2)
    log, flat = tmp_path / "rewards.txt", literal.CAPTIONS[rows[0]]
    body = (
        f"scores = images.mean((1, 2, 3)) * torch.tensor([prompt != {flat!r} for prompt in prompts])\n"
        f"    with open({str(log)!r}, 'a') as file:\n        for prompt, value in zip(prompts, scores):\n"
        "            file.write(f'{float(value)!r} {prompt}\\n')\n    return scores"
    )
    options = {**prompts, "reward_model": literal.write_reward(tmp_path, body), "max_grad_norm": 1e9}
    options |= {"num_noisy_latents": n, "trajectory_nums": m, "infer_steps": steps, "learning_rate": 1e-3}
    options |= {"generation_batch_size": 3, "score_batch_size": 5, "train_rows": 5, "max_train_steps": 2}
    assert train(flags(**options)) == 0
    _, kept = draw_paths(0, draws, n, literal.LATENT, steps, m)

    # The states of every path, from slices that were sampled one after the other.
    generated = literal.of(seen, "generate", step=1)
    assert [len(part.x) for part in generated] == [3] * 4 + [3] * 4 + [2] * 4
    states = [torch.cat([part.x for part in generated[k::steps]]) for k in range(steps)]
    condition = sdxl.Condition(*map(torch.cat, zip(*(part.condition for part in generated[::steps]), strict=True)))
    assert torch.equal(condition.pooled.unflatten(0, (2, n))[:, 0], condition.pooled.unflatten(0, (2, n))[:, -1])
    assert not torch.equal(condition.pooled[0], condition.pooled[-1])

    # The rewards are of the images of those paths, and of their prompts.
    judged = [line.split(maxsplit=1) for line in log.read_text().splitlines()][2 * n :]
    assert [prompt for _, prompt in judged] == [literal.CAPTIONS[row] for row in rows for _ in range(n)]
    rewards = torch.tensor([float(value) for value, _ in judged], dtype=torch.float32)
    latents = literal.samples(generated, steps, 1)
    expected = literal.brightness(world.model, latents)
    torch.testing.assert_close(rewards[n:], expected[n:], rtol=1e-4, atol=1e-6)
    advantage = advantages(select(rewards[:, None], torch.ones(2 * n, 1, dtype=torch.bool), n)).flatten()
    assert advantage[:n].abs().max() == 0 and advantage[n:].abs().max() > 0.5

    trained = literal.of(seen, "train", step=1)
    assert [len(part.x) for part in trained] == [5, 5, 5, 1]
    x, t, of_rows = literal.together(trained)
    scheduler = scheduler_of(make_pipeline(seed=0).scheduler.config, "epsilon", steps)
    unet = literal.unet_with(world.model, seen.updates[1].weights)
    for part in generated:  # by the model as it is
        with torch.no_grad():
            output = sdxl.predict_output(unet, part.x, part.t, part.condition)
        torch.testing.assert_close(part.output, output, rtol=1e-9, atol=1e-9)
    objective = 0.0
    for row in range(2 * n):
        for k in range(m):
            step, index = int(kept[row, k]), row * m + k
            assert torch.equal(x[index], states[step][row]) and t[index] == scheduler.timesteps[step]
            assert torch.equal(of_rows.embeds[index], condition.embeds[row])
            output = sdxl.predict_output(unet, x[[index]], t[[index]], of_rows.rows(slice(index, index + 1)))
            reached = states[step + 1][[row]]
            density = log_density(scheduler, output, int(t[index]), x[[index]], reached)
            objective = objective - advantage[row].double() * density.sum() / (2 * n * m)
    objective.backward()
    assert gradient(unet).norm() > 0
    assert (seen.updates[1].gradient - gradient(unet)).norm() <= 1e-9 * gradient(unet).norm()


@pytest.mark.usefixtures("no_result", "in_double")
@pytest.mark.parametrize("train_rows", [1, 3])
def test_any_slices_give_one_gradient(train_rows, train, flags, prompts, seen, quick):
    options = {**prompts, **quick, "num_noisy_latents": 3, "max_train_steps": 1, "max_grad_norm": 1e9}
    for rows in (100, train_rows):
        assert train(flags(**options, train_rows=rows, output_dir=prompts["prompts_file"].parent / str(rows))) == 0
    whole, sliced = (update.gradient for update in seen.updates)
    assert whole.norm() > 0 and (whole - sliced).norm() <= 1e-10 * whole.norm()


def test_scheduler_that_starts_from_pure_noise_is_refused(train, flags, world, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    config = model / "scheduler" / "scheduler_config.json"
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    assert train(flags(pretrained_model_name_or_path=model)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "pure noise" in error and "use a scheduler without rescale_betas_zero_snr" in error
    assert not (tmp_path / "run").exists()
