"""The objective of the SFT script: gradients against float64 autograd, standard fine-tuning, and flat memory."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from benchmarks.memory import LiveMemory
from sharpening import sdxl
from sharpening.regression import Regression
from sharpening.selection import score_branches, select
from sharpening.trajectory import Branches, Path, Schedule, outputs_through_sampler, walk_path
from tests.support.objective import (
    ConvolutionalDenoiser,
    default_dtype,
    denoiser,
    double_precision,
    double_schedule,
    gradient,
    problem,
)
from tiny_world.make_tiny_sdxl import make_pipeline
from train_sft_diffusion_sharpening_sdxl import sft_weights


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline(seed=0)


@pytest.fixture(scope="module")
def double_pipeline():
    return double_precision(make_pipeline(seed=0))


def judge(x0_hat, rows):
    return lambda: (x0_hat.mean((1, 2, 3)).float(), {})


def weights_of(active, usable, like):
    with default_dtype(like.dtype):
        return sft_weights(active, usable)


def regress(unet, regression, chosen, path, condition, weights, train_rows):
    """TRAIN on rows in slices: the loss; the gradient is left in the parameters."""
    unet.zero_grad(set_to_none=False)
    total = 0.0
    for rows in regression.rows(chosen, path, condition, weights).split(train_rows):
        loss = rows.loss(sdxl.predict_output(unet, rows.x, rows.t, rows.condition))
        loss.backward()
        total += float(loss.detach())
    return total


def train(
    unet, condition, regression, x_0, eps, t, n, m, through_sampler=False, train_rows=2, batch_size=2, choices=None
):
    """SAMPLE to TRAIN as the script does them: the loss; the gradient is left in the parameters."""
    schedule, prompts = regression.schedule, len(t) // n
    branches = Branches.begin(schedule, x_0, eps, t)
    walking = denoiser(unet, condition.rows(torch.arange(len(t)) // n))
    best, usable = torch.arange(prompts), torch.ones(prompts, dtype=torch.bool)
    if n == 1:
        path = walk_path(walking.rows, schedule, branches, m, batch_size, outputs=False)
    else:
        scores, path = score_branches(walking.rows, judge, schedule, branches, m, batch_size, outputs=False)
        selection = select(scores.rewards, scores.active, n)
        best, usable = selection.best_rows, selection.scored.any(1)
    if choices is not None:
        choices.append(best % n)
    chosen, path = branches.rows(best), path.rows(best)
    weights = weights_of(path.active, usable, x_0)
    if not through_sampler:
        return regress(unet, regression, chosen, path, condition, weights, train_rows)
    unet.zero_grad(set_to_none=False)
    output = outputs_through_sampler(denoiser(unet, condition).rows(slice(None)), schedule, chosen, m)
    loss = (weights * regression.errors(chosen, path, output)).sum()
    loss.backward()
    return float(loss.detach())


def whole_objective(unet, condition, x_0, eps, t, n, m, through_sampler=False):
    """Algorithm 1 read literally, one row at a time with diffusers' own sampler: every branch with its graph, the best
    one by reward, equation 9 as one scalar."""
    config = make_pipeline(seed=0).scheduler.config
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(25)
    alphas = scheduler.alphas_cumprod.double()
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = alphas, alphas[0]
    total = 0.0
    for prompt in range(len(x_0) // n):
        branches = []
        for row in range(prompt * n, (prompt + 1) * n):
            timestep = int(t[row])
            x = alphas[timestep].sqrt() * x_0[row] + (1 - alphas[timestep]).sqrt() * eps[row]
            rewards, errors = [], []
            for _ in range(m):
                if timestep < 0:
                    break
                output = sdxl.predict_output(
                    unet, x[None], torch.tensor([timestep]), condition.rows(torch.tensor([prompt]))
                )
                followed = output if through_sampler else output.detach()
                result = scheduler.step(followed, timestep, x[None])
                rewards.append(float(result.pred_original_sample.detach().mean()))
                errors.append(torch.nn.functional.mse_loss(output[0], eps[row]))
                x, timestep = result.prev_sample[0], timestep - 40
            branches.append((sum(rewards), sum(errors) / len(errors)))
        total = total + max(branches, key=lambda branch: branch[0])[1]
    return total / (len(x_0) // n)


@pytest.mark.parametrize("through_sampler", [False, True])
@pytest.mark.parametrize("prompts", [1, 4])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("m", [1, 3])
def test_gradient_equals_autograd_of_the_whole_objective(double_pipeline, prompts, n, m, through_sampler):
    unet, condition, x_0, eps, t = problem(double_pipeline, prompts, n, torch.float64)
    regression = Regression(double_schedule(double_pipeline))
    loss = train(unet, condition, regression, x_0, eps, t, n, m, through_sampler)
    ours = gradient(unet).clone()
    unet.zero_grad()
    expected = whole_objective(unet, condition, x_0, eps, t, n, m, through_sampler)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-10)
    assert (ours - gradient(unet)).norm() <= 1e-10 * gradient(unet).norm()


@pytest.mark.parametrize("options", [{}, {"kind": "consistent", "snr_gamma": 5.0}], ids=["published", "consistent"])
@pytest.mark.parametrize("n", [1, 3])
def test_any_slicing_gives_one_gradient(double_pipeline, n, options):
    unet, condition, x_0, eps, t = problem(double_pipeline, 4, n, torch.float64)
    regression = Regression(double_schedule(double_pipeline), **options)
    whole = train(unet, condition, regression, x_0, eps, t, n, 3, train_rows=100)
    expected = gradient(unet).clone()
    assert expected.norm() > 0
    for train_rows in (1, 3):
        loss = train(unet, condition, regression, x_0, eps, t, n, 3, train_rows=train_rows)
        assert loss == pytest.approx(whole, rel=1e-10)
        assert (gradient(unet) - expected).norm() <= 1e-10 * expected.norm()


def test_prompt_without_any_score_carries_no_gradient(pipeline):
    """The other prompt's gradient is what it is beside a prompt that has scores: the divisor stays the batch."""
    m = 3
    unet, condition, x_0, eps, t = problem(pipeline, 2, 1, torch.float32, torch.tensor([400, 900]))
    regression = Regression(Schedule.from_config(pipeline.scheduler.config, 25))
    branches = Branches.begin(regression.schedule, x_0, eps, t)
    path = walk_path(denoiser(unet, condition).rows, regression.schedule, branches, m, 2, outputs=False)

    def gradient_of(count, usable):
        rows = torch.arange(count)
        part = path.rows(rows)
        weights = sft_weights(part.active, torch.tensor(usable))
        regress(unet, regression, branches.rows(rows), part, condition.rows(rows), weights, 100)
        return gradient(unet).clone()

    both, alone = gradient_of(2, [True, False]), gradient_of(1, [True])
    assert both.isfinite().all() and both.norm() > 0
    assert (2 * both - alone).norm() < 1e-5 * alone.norm()
    assert gradient_of(2, [False, False]).abs().max() == 0


def test_weights_are_means_over_steps_and_prompts():
    active = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    weights = sft_weights(active, torch.tensor([True, True, False]))
    third = 1 / 3
    expected = torch.tensor([[third, third, third], [1, 0, 0], [0, 0, 0]]) / 3
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_one_branch_of_one_step_is_standard_fine_tuning(pipeline, prediction_type, snr_gamma):
    """Equal loss and gradient to a plain diffusers training step on the same noise, Min-SNR weighting included."""
    unet, condition, x_0, eps, t = problem(pipeline, 4, 1, torch.float32)
    schedule = Schedule.from_config(pipeline.scheduler.config, 25, prediction_type)
    loss = train(unet, condition, Regression(schedule, snr_gamma=snr_gamma), x_0, eps, t, 1, 1)
    ours = gradient(unet).clone()

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    noisy = scheduler.add_noise(x_0, eps, t)
    target = eps if prediction_type == "epsilon" else scheduler.get_velocity(x_0, eps, t)
    added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
    output = unet(noisy, t, condition.embeds, added_cond_kwargs=added).sample
    per_row = torch.nn.functional.mse_loss(output, target, reduction="none").mean((1, 2, 3))
    if snr_gamma:
        snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
        per_row = per_row * snr.clamp(max=snr_gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    unet.zero_grad()
    per_row.mean().backward()
    assert loss == pytest.approx(float(per_row.mean().detach()), rel=1e-6)
    assert (ours - gradient(unet)).norm() <= 1e-5 * gradient(unet).norm()


def test_permuting_prompts_permutes_choices_and_keeps_the_gradient(pipeline):
    regression = Regression(Schedule.from_config(pipeline.scheduler.config, 25))
    unet, condition, x_0, eps, t = problem(pipeline, 4, 3, torch.float64)
    choices = []
    loss = train(unet, condition, regression, x_0, eps, t, 3, 3, choices=choices)
    before = gradient(unet).clone()
    permutation = torch.tensor([2, 0, 3, 1])
    rows = (permutation[:, None] * 3 + torch.arange(3)).flatten()
    permuted = (condition.rows(permutation), regression, x_0[rows], eps[rows], t[rows])
    assert train(unet, *permuted, 3, 3, choices=choices) == pytest.approx(loss, rel=1e-6)
    assert torch.equal(choices[1], choices[0][permutation])
    assert (gradient(unet) - before).norm() <= 1e-6 * before.norm()


def test_peak_memory_is_flat_in_branches_and_steps_and_grows_with_rows_alone(pipeline):
    unet = ConvolutionalDenoiser()
    regression = Regression(Schedule.from_config(pipeline.scheduler.config, 25))

    def peak(n, m, train_rows=1, through_sampler=False):
        _, condition, x_0, eps, t = problem(pipeline, 1, n, torch.float32, torch.tensor([981]), size=32)
        for parameter in unet.parameters():  # as in every optimizer step that accumulates, m = 1 included
            parameter.grad = torch.zeros_like(parameter)
        with LiveMemory() as memory:
            train(unet, condition, regression, x_0, eps, t, n, m, through_sampler, train_rows, batch_size=1)
        return memory.peak

    for train_rows, steps in ((1, (1, 3, 8)), (3, (3, 8))):
        peaks = {(n, m): peak(n, m, train_rows) for n in (1, 3, 8) for m in steps}
        assert max(peaks.values()) <= 1.1 * min(peaks.values()), peaks
        # The measure does see what rows and a joint graph cost.
        assert min(peaks.values()) > 0.8 * train_rows * peak(1, 1)
        assert peak(3, 8, train_rows, through_sampler=True) > 1.5 * max(peaks.values())


def test_inactive_steps_are_no_rows(pipeline):
    """A state below t = 0 is neither trained on nor counted, whatever it holds."""
    unet, condition, x_0, eps, t = problem(pipeline, 2, 1, torch.float32)  # the first ends after one step of three
    regression = Regression(Schedule.from_config(pipeline.scheduler.config, 25))
    branches = Branches.begin(regression.schedule, x_0, eps, t)
    path = walk_path(denoiser(unet, condition).rows, regression.schedule, branches, 3, 2, outputs=False)
    assert path.active.tolist() == [[True, False, False], [True, True, True]]
    spoiled = Path(path.x.masked_fill(~path.active[..., None, None, None], torch.nan), path.t, path.active)
    weights = sft_weights(path.active, torch.ones(2, dtype=torch.bool))
    rows = regression.rows(branches, spoiled, condition, weights)
    assert rows.t.tolist() == [5, 981, 941, 901] and rows.x.isfinite().all()
    assert rows.weight.tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert torch.equal(rows.condition.pooled, condition.pooled[[0, 1, 1, 1]])
