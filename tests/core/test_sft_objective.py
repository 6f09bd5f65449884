"""The objective of the SFT script: gradients against float64 autograd, standard fine-tuning, and flat memory."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from sharpening import sdxl
from sharpening.trajectory import Schedule, score_branches, select
from tests.support.objective import ConvolutionalDenoiser, LiveMemory, double_precision, gradient, problem
from tiny_world.make_tiny_sdxl import make_pipeline
from train_sft_diffusion_sharpening_sdxl import sft_losses

OPTIONS = SimpleNamespace(backprop_through_sampler=False, branch_target="noise", snr_gamma=None)


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline(seed=0)


@pytest.fixture(scope="module")
def double_pipeline():
    return double_precision(make_pipeline(seed=0))


def two_pass(unet, condition, schedule, x_0, eps, t, n, m, args=OPTIONS, batch_size=2):
    """SCORE, SELECT and TRAIN as the script does them; the gradient is left in the parameters."""
    unconditional = sdxl.Unconditional(torch.zeros_like(condition.embeds[:1]), torch.zeros_like(condition.pooled[:1]))
    x_t = schedule.add_noise(x_0, eps, t)
    scores = score_branches(
        lambda rows: sdxl.branch_model(unet, condition.rows(rows // n), unconditional, 1.0),
        lambda x0_hat, rows: lambda: (x0_hat.mean((1, 2, 3)).float(), {}),
        schedule,
        x_t,
        t,
        m,
        batch_size,
    )
    prompts = len(x_t) // n
    selection = select(scores.rewards.view(prompts, n, m), scores.active.view(prompts, n, m))
    best = torch.arange(prompts) * n + selection.best
    predict, guide = sdxl.branch_model(unet, condition, unconditional, 1.0)
    unet.zero_grad(set_to_none=False)
    total, pending = 0.0, 0.0
    losses = list if args.backprop_through_sampler else iter
    for loss in losses(
        sft_losses(args, predict, guide, schedule, x_t[best], t[best], x_0[best], eps[best], scores.active[best])
    ):
        pending = pending + loss if args.backprop_through_sampler else loss.backward()
        total += float(loss.detach())
    if args.backprop_through_sampler:
        pending.backward()
    return total, selection


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
def test_two_pass_gradient_equals_autograd_of_the_whole_objective(double_pipeline, prompts, n, m, through_sampler):
    schedule = Schedule.from_config(double_pipeline.scheduler.config, 25)
    schedule = Schedule(
        schedule.alphas_cumprod.double(), float(schedule.alphas_cumprod[0]), "epsilon", 40, schedule.timesteps
    )
    unet, condition, x_0, eps, t = problem(double_pipeline, prompts, n, torch.float64)
    args = SimpleNamespace(**{**vars(OPTIONS), "backprop_through_sampler": through_sampler})
    loss, _ = two_pass(unet, condition, schedule, x_0, eps, t, n, m, args)
    ours = gradient(unet).clone()
    unet.zero_grad()
    expected = whole_objective(unet, condition, x_0, eps, t, n, m, through_sampler)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-10)
    assert (ours - gradient(unet)).norm() <= 1e-10 * gradient(unet).norm()


def test_prompt_without_any_score_carries_no_gradient(pipeline):
    """The other prompt's gradient is what it is beside a prompt that has scores: the divisor stays the batch."""
    n, m = 1, 3
    unet, condition, x_0, eps, t = problem(pipeline, 2, n, torch.float32, torch.tensor([400, 900]))
    predict = sdxl.branch_model(unet, condition, None, 1.0)[0]
    first = sdxl.branch_model(unet, condition.rows(torch.tensor([0])), None, 1.0)[0]
    schedule = Schedule.from_config(pipeline.scheduler.config, 25)
    x_t, active = schedule.add_noise(x_0, eps, t), torch.ones(2, m, dtype=torch.bool)
    active[1] = False

    def gradient_of(predict, rows, active):
        unet.zero_grad(set_to_none=False)
        losses = sft_losses(OPTIONS, predict, None, schedule, x_t[rows], t[rows], x_0[rows], eps[rows], active)
        sum(losses).backward()
        return gradient(unet)

    both, alone = gradient_of(predict, slice(2), active), gradient_of(first, slice(1), active[:1])
    assert both.isfinite().all() and both.norm() > 0
    assert (2 * both - alone).norm() < 1e-5 * alone.norm()
    assert gradient_of(predict, slice(2), torch.zeros(2, m, dtype=torch.bool)).abs().max() == 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_one_branch_of_one_step_is_standard_fine_tuning(pipeline, prediction_type, snr_gamma):
    """Equal loss and gradient to a plain diffusers training step on the same noise, Min-SNR weighting included."""
    unet, condition, x_0, eps, t = problem(pipeline, 4, 1, torch.float32)
    schedule = Schedule.from_config(pipeline.scheduler.config, 25, prediction_type)
    args = SimpleNamespace(**{**vars(OPTIONS), "snr_gamma": snr_gamma})
    loss, _ = two_pass(unet, condition, schedule, x_0, eps, t, 1, 1, args)
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
    schedule = Schedule.from_config(pipeline.scheduler.config, 25)
    unet, condition, x_0, eps, t = problem(pipeline, 4, 3, torch.float64)
    loss, selection = two_pass(unet, condition, schedule, x_0, eps, t, 3, 3)
    before = gradient(unet).clone()
    permutation = torch.tensor([2, 0, 3, 1])
    rows = (permutation[:, None] * 3 + torch.arange(3)).flatten()
    permuted = two_pass(unet, condition.rows(permutation), schedule, x_0[rows], eps[rows], t[rows], 3, 3)
    assert permuted[0] == pytest.approx(loss, rel=1e-6)
    assert torch.equal(permuted[1].best, selection.best[permutation])
    assert (gradient(unet) - before).norm() <= 1e-6 * before.norm()


def test_peak_memory_is_flat_in_branches_and_steps(pipeline):
    schedule, unet = Schedule.from_config(pipeline.scheduler.config, 25), ConvolutionalDenoiser()
    peaks = {}
    for n in (1, 3, 8):
        for m in (1, 3, 8):
            _, *rest = problem(pipeline, 1, n, torch.float32, torch.tensor([981]), size=32)
            condition, x_0, eps, t = rest
            for parameter in unet.parameters():  # as in every optimizer step that accumulates, m = 1 included
                parameter.grad = torch.zeros_like(parameter)
            with LiveMemory() as memory:
                two_pass(unet, condition, schedule, x_0, eps, t, n, m, batch_size=1)
            peaks[n, m] = memory.peak
    assert max(peaks.values()) <= 1.1 * min(peaks.values()), peaks
    joint = SimpleNamespace(**{**vars(OPTIONS), "backprop_through_sampler": True})
    with LiveMemory() as memory:
        two_pass(unet, condition, schedule, x_0, eps, t, 8, 8, joint, batch_size=1)
    assert memory.peak > 2 * max(peaks.values())  # the measure does see what a joint graph costs
