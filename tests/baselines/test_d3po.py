"""D3PO: its loss against its publication, its gradient against autograd of the sampler's own densities, its paths."""

import json
import math
import shutil

import pytest
import torch
from diffusers import DDIMScheduler

from baselines.d3po import d3po_loss
from sharpening import sdxl
from sharpening.stochastic import sample_paths
from sharpening.trajectory import Model, Schedule
from tests.baselines import literal
from tests.support.runs import ROOT, metrics
from tiny_world.make_tiny_sdxl import make_pipeline

BETA, CLIP = 0.1, 0.1


@pytest.fixture
def method():
    return "D3PO"


# ---------------------------------------------------------------------------------------------------------- the loss


def densities(seed=0, count=200, spread=0.1):
    """Log-densities of pairs under the model and the reference, (count, 2) float64."""
    return spread * torch.randn(2, count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def published(log_density, reference):
    """As the released code has it, with ratios: the first of a pair is preferred."""
    ratio = (log_density - reference).exp().clamp(0.9, 1.1)
    return -torch.log(torch.sigmoid(0.1 * ratio[:, 0].log() * 1.0 + 0.1 * ratio[:, 1].log() * -1.0))


def test_loss_and_gradient_are_the_published_ones():
    log_density, reference = densities()
    ours, theirs = log_density.clone().requires_grad_(), log_density.clone().requires_grad_()
    preference, loss = d3po_loss(BETA, CLIP, ours, reference), published(theirs, reference)
    torch.testing.assert_close(preference.loss, loss, rtol=1e-12, atol=0)
    preference.loss.sum().backward()
    loss.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=0)
    outside = ((log_density - reference).exp() - 1).abs() > CLIP
    assert 50 < outside.sum() < 350  # of 400
    assert ours.grad[outside].abs().max() == 0 and ours.grad[~outside].abs().min() > 0
    assert torch.equal(preference.log_ratios, log_density - reference)


def test_loss_stays_near_log_2_and_is_log_2_at_the_reference():
    log_density, reference = densities(spread=10.0)
    bound = BETA * (math.log(1.1) - math.log(0.9))
    loss = d3po_loss(BETA, CLIP, log_density, reference).loss
    low, high = math.log1p(math.exp(-bound)), math.log1p(math.exp(bound))
    assert low > 0.683 and high < 0.704
    assert loss.min() == pytest.approx(low) and loss.max() == pytest.approx(high)
    alike = d3po_loss(BETA, CLIP, reference, reference).loss
    torch.testing.assert_close(alike, torch.full_like(alike, 2.0).log())


def test_descent_makes_what_is_preferred_more_likely():
    """On a Gaussian toy whose reward is known: the model outputs a constant theta as its clean estimate; samples are
    the more to its side the larger theta is. Preferring the larger of two raises theta, the smaller lowers it."""
    config = make_pipeline(seed=0).scheduler.config
    schedule = Schedule.from_config(config, 5, "sample")
    pairs, generator = 2000, torch.Generator().manual_seed(0)
    x = torch.randn(pairs, 1, 1, 1, generator=generator).repeat_interleave(2, 0)
    noises = torch.randn(2 * pairs, 4, 1, 1, 1, generator=generator)
    with torch.no_grad():
        _, path = sample_paths(Model(lambda x, t: torch.zeros_like(x)), schedule, x, noises)
    # Not the clean latent: it is the model's constant but for little noise.
    best = path.x[:, -1].view(-1, 2).argmax(1)
    for order, sign in ((torch.stack([best, 1 - best], 1), -1), (torch.stack([1 - best, best], 1), 1)):
        theta = torch.zeros((), requires_grad=True)
        rows = (order + 2 * torch.arange(pairs)[:, None]).flatten()  # the preferred one first
        density, reference = (
            -(path.precision * (value - path.target).square().flatten(2).mean(2))[rows].view(pairs, 2, 4)
            for value in (theta, torch.zeros(()))
        )
        parts = (of.transpose(1, 2).flatten(0, 1) for of in (density, reference))
        d3po_loss(BETA, CLIP, *parts).loss.mean().backward()
        assert sign * theta.grad > 0.001


# ---------------------------------------------------------------------------------------------------------- the runs


def literal_loss(unet, base, states, rewards, condition, n, scale):
    """D3PO's mean loss over pairs and steps, on the states (R, ...) of every step of the paths of `rewards` (P, n), by
    the sampler's own Gaussians, one state at a time; and the ratios of the pairs that are not tied, best first."""
    config = make_pipeline(seed=0).scheduler.config
    scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(len(states))
    stride = scheduler.config.num_train_timesteps // len(states)
    total, ratios = 0.0, []
    for prompt in range(len(rewards)):
        if rewards[prompt].max() == rewards[prompt].min():
            total += (len(states) - 1) * math.log(2)
            continue
        order = rewards[prompt].argsort(descending=True)
        pair = [prompt * n + int(order[0]), prompt * n + int(order[-1])]
        for step, timestep in enumerate(scheduler.timesteps.tolist()[:-1]):
            logs = []
            for row in pair:
                state, reached = states[step][[row]], states[step + 1][[row]]
                with_prompt = condition.rows(slice(row, row + 1))
                without = sdxl.Condition(*map(torch.zeros_like, with_prompt[:2]), with_prompt.time_ids)
                of_models = []
                for model in (unet, base):
                    t = torch.tensor([timestep])
                    conditional = sdxl.predict_output(model, state, t, with_prompt)
                    unconditional = sdxl.predict_output(model, state, t, without)
                    noise = unconditional + scale * (conditional - unconditional)
                    nothing = torch.zeros_like(state)
                    mean = scheduler.step(noise, timestep, state, eta=1.0, variance_noise=nothing).prev_sample
                    spread = scheduler._get_variance(timestep, timestep - stride).sqrt()
                    of_models.append(torch.distributions.Normal(mean, spread).log_prob(reached).mean())
                ratio = (of_models[0] - of_models[1]).exp()
                ratios.append(float(ratio.detach()))
                logs.append(ratio.clamp(1 - CLIP, 1 + CLIP).log())
            total = total - torch.nn.functional.logsigmoid(BETA * (logs[0] - logs[1]))
    return total / (len(rewards) * (len(states) - 1)), torch.tensor(ratios)


@pytest.mark.usefixtures("no_result", "in_double")
@pytest.mark.parametrize(("scale", "lora"), [(1.0, False), (3.0, False), (3.0, True)])
def test_gradient_is_that_of_the_literal_loss_on_the_sampled_paths(
    scale, lora, train, flags, world, prompts, seen, tmp_path
):
    """Slices of 3 generate, slices of 5 train. At the second step, where the model has left its reference and some of
    the ratios are beyond their bounds; the images of its first prompt earn the same."""
    n, steps = 3, 4
    rows, _ = literal.drawn(1, 4, 2)
    flat = literal.CAPTIONS[rows[0]]
    body = f"return images.mean((1, 2, 3)) * torch.tensor([prompt != {flat!r} for prompt in prompts])"
    options = {**prompts, "reward_model": literal.write_reward(tmp_path, body), "max_grad_norm": 1e9}
    options |= {"num_noisy_latents": n, "infer_steps": steps, "guidance_scale": scale, "use_lora": lora}
    options |= {"generation_batch_size": 3, "score_batch_size": 5, "train_rows": 5, "max_train_steps": 2}
    assert train(flags(**options, learning_rate=3e-2 if lora else 1e-3)) == 0

    generated = literal.of(seen, "generate", step=1)
    size = 3 if scale == 1 else 6
    assert [len(part.x) for part in generated] == [size] * 2 * steps
    states = [torch.cat([part.x[:3] for part in generated[k::steps]]) for k in range(steps)]
    parts = (part.condition.rows(slice(0, 3)) for part in generated[::steps])
    condition = sdxl.Condition(*map(torch.cat, zip(*parts, strict=True)))
    # Paths of a prompt leave one noise, each in its own direction.
    for prompt in range(2):
        one, *others = range(prompt * n, prompt * n + n)
        assert all(torch.equal(states[0][one], states[0][row]) for row in others)
        assert not any(torch.allclose(states[1][one], states[1][row], atol=0.1) for row in others)
    assert not torch.equal(states[0][0], states[0][n])

    rewards = literal.brightness(world.model, literal.samples(generated, steps, scale)).view(2, n)
    rewards[0] = 0
    unet = literal.unet_with(world.model, seen.updates[1].weights, lora)
    base = literal.unet_with(world.model)
    loss, ratios = literal_loss(unet, base, states, rewards, condition, n, scale)
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in sdxl.trainable_parameters(unet)])
    assert expected.norm() > 0
    assert (seen.updates[1].gradient - expected).norm() <= 1e-9 * expected.norm()

    line = metrics(tmp_path / "run")[1]
    beyond = ((ratios - 1).abs() > CLIP).double().mean()
    assert 0 < beyond < 1 and line["preference/clamped"] == pytest.approx(float(beyond))
    assert 2 * float(loss.detach()) - math.log(2) == pytest.approx(line["loss"], rel=1e-6)
    best, worst = ratios.view(-1, 2).log().T
    assert line["preference/steps_won"] == pytest.approx(float((best > worst).double().mean()))
    assert line["preference/log_ratio_best"] == pytest.approx(float(best.mean()), rel=1e-5)
    assert line["preference/log_ratio_worst"] == pytest.approx(float(worst.mean()), rel=1e-5)
    assert line["reward/margin"] == pytest.approx(float(rewards[1].max() - rewards[1].min()), rel=1e-3)
    assert line["reward/tie_rate"] == 0.5


@pytest.mark.usefixtures("no_result")
def test_only_ties_leave_the_weights_alone_but_for_their_decay(train, flags, quick, tmp_path):
    options = {**quick, "reward_model": literal.write_reward(tmp_path, "return torch.ones(len(prompts))")}
    assert train(flags(**options)) == 0
    for line in metrics(tmp_path / "run"):
        assert line["grad_norm"] == 0 and line["reward/tie_rate"] == 1 and "loss" not in line


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("lora", [False, True])
def test_at_the_reference_no_path_is_more_likely(lora, train, flags, quick, tmp_path):
    options = {**quick, "pretrained_model_name_or_path": ROOT / "tiny_world" / "sdxl", "use_lora": lora}
    assert train(flags(**options, train_batch_size=4, max_train_steps=1)) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert line["preference/steps_won"] == 0.5 and line["preference/logits"] == pytest.approx(0, abs=1e-6)
    assert line["preference/clamped"] == 0 and line["preference/kl"] < 1e-9
    assert "preference/accuracy" not in line  # of which a coin's share would be warned of after some hundred steps


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
