"""The objective of the RLHF script: loss and gradient against float64 autograd, its limits, and flat memory."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from sharpening import sdxl
from sharpening.trajectory import Schedule, branch_error, score_branches, select
from tests.support.objective import ConvolutionalDenoiser, LiveMemory, double_precision, gradient, problem
from tiny_world.make_tiny_sdxl import make_pipeline
from train_rlhf_diffusion_sharpening_sdxl import preference_loss, rlhf_losses

OPTIONS = {
    "backprop_through_sampler": False, "branch_target": "noise", "snr_gamma": None, "beta_dpo": 30.0,
    "reward_margin_scale": 1.0, "reward_margin": "inside", "reference_steps": "all", "train_on": "pair",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline(seed=0)


@pytest.fixture(scope="module")
def double_pipeline():
    return double_precision(make_pipeline(seed=0))


def reference_of(unet):
    """Another model: at the reference itself all log ratios are zero and much would go unseen."""
    reference = type(unet).from_config(unet.config).to(unet.dtype)
    for name in ("time_proj", "add_time_proj"):
        setattr(reference, name, getattr(unet, name))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for ours, theirs in zip(reference.parameters(), unet.parameters(), strict=True):
            noise = torch.randn(theirs.shape, generator=generator).to(theirs)
            ours.copy_(theirs + 0.02 * noise)
    return reference.requires_grad_(False)


def reward_of(x0_hat):
    return 10 * x0_hat.mean((1, 2, 3))


def two_pass(unet, reference, condition, schedule, x_0, eps, t, n, m, swapped=False, batch_size=2, **changes):
    """SCORE, SELECT, COMPARE and TRAIN as the script does them; the gradient is left in the parameters."""
    args = SimpleNamespace(**{**OPTIONS, **changes})
    unconditional = sdxl.Unconditional(torch.zeros_like(condition.embeds[:1]), torch.zeros_like(condition.pooled[:1]))

    def model_of(rows):
        return sdxl.branch_model(unet, condition.rows(rows // n), unconditional, 1.0)

    x_t = schedule.add_noise(x_0, eps, t)
    scores = score_branches(
        model_of, lambda x, rows: lambda: (reward_of(x).float(), {}), schedule, x_t, t, m, batch_size, keep_path=True
    )
    prompts = len(x_t) // n
    selection = select(scores.rewards.view(prompts, n, m), scores.active.view(prompts, n, m))
    pair = torch.stack([selection.best, selection.worst], 1)
    pair = pair.flip(1) if swapped else pair
    rows = (torch.arange(prompts)[:, None] * n + pair).flatten()
    path = [point.rows(rows) for point in scores.path]
    of_pairs = condition.rows(rows // n)
    target = {"x_0": x_0[rows], "eps": eps[rows], "kind": args.branch_target, "snr_gamma": args.snr_gamma}
    with torch.no_grad():
        errors = [branch_error(schedule, point, point.output, **target) for point in path]
        reference_errors = [
            branch_error(schedule, point, sdxl.predict_output(reference, point.x, point.t, of_pairs), **target)
            for point in (path if args.reference_steps == "all" else path[:1])
        ]
    preference = preference_loss(
        args,
        torch.stack(errors, 1).unflatten(0, (-1, 2)),
        torch.stack(reference_errors, 1).unflatten(0, (-1, 2)),
        torch.stack([point.active for point in path], 1).unflatten(0, (-1, 2)),
        selection.branch_reward.gather(1, pair).to(x_0.dtype),
        ~selection.tied,
    )
    predict, guide = model_of(rows)
    unet.zero_grad(set_to_none=False)
    weights = preference.weights.flatten(0, 1)
    losses = rlhf_losses(args, predict, guide, schedule, x_t[rows], t[rows], x_0[rows], eps[rows], weights)
    if args.backprop_through_sampler:
        sum(losses).backward()
    else:
        for loss in losses:
            loss.backward()
    return preference, selection


def whole_objective(unet, reference, condition, x_0, eps, t, n, m, changes):
    """Algorithm 2 read literally, one row at a time with diffusers' own sampler: every branch with its graph and its
    reference, best and worst by reward, equation 11 as one scalar."""
    args = SimpleNamespace(**{**OPTIONS, **changes})
    scheduler = DDIMScheduler.from_config(make_pipeline(seed=0).scheduler.config)
    scheduler.set_timesteps(25)
    alphas = scheduler.alphas_cumprod.double()
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = alphas, alphas[0]
    total = 0.0
    for prompt in range(len(x_0) // n):
        branches = []
        for row in range(prompt * n, (prompt + 1) * n):
            timestep, c = int(t[row]), condition.rows(torch.tensor([prompt]))
            x = alphas[timestep].sqrt() * x_0[row] + (1 - alphas[timestep]).sqrt() * eps[row]
            rewards, errors, reference_errors = [], [], []
            for _ in range(m):
                if timestep < 0:
                    break
                output = sdxl.predict_output(unet, x[None], torch.tensor([timestep]), c)
                # The reference is measured on the states as they are: no gradient flows through it.
                theirs = sdxl.predict_output(reference, x[None].detach(), torch.tensor([timestep]), c)
                followed = output if args.backprop_through_sampler else output.detach()
                result = scheduler.step(followed, timestep, x[None])
                rewards.append(float(reward_of(result.pred_original_sample.detach())))
                errors.append(torch.nn.functional.mse_loss(output[0], eps[row]))
                reference_errors.append(torch.nn.functional.mse_loss(theirs[0], eps[row]))
                x, timestep = result.prev_sample[0], timestep - 40
            if args.reference_steps == "first":
                reference_errors = reference_errors[:1]
            log_ratio = -(sum(errors) / len(errors) - sum(reference_errors) / len(reference_errors))
            branches.append((float(torch.tensor(rewards).mean()), log_ratio))  # in float32, as rewards are by contract
        best, worst = max(branches, key=lambda b: b[0]), min(branches, key=lambda b: b[0])
        margin = args.reward_margin_scale * (best[0] - worst[0])
        inside = args.reward_margin == "inside"
        logits = args.beta_dpo * (best[1] - worst[1]) - (margin if inside else 0)
        total = total - torch.nn.functional.logsigmoid(logits) + (0 if inside else margin)
    return total / (len(x_0) // n)


def double_schedule(pipeline):
    schedule = Schedule.from_config(pipeline.scheduler.config, 25)
    return Schedule(
        schedule.alphas_cumprod.double(), float(schedule.alphas_cumprod[0]), "epsilon", 40, schedule.timesteps
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reward_margin_scale": 0.0},
        {"reward_margin": "outside"},
        {"reference_steps": "first"},
        {"backprop_through_sampler": True},
        {"reward_margin": "outside", "reference_steps": "first", "backprop_through_sampler": True},
    ],
    ids=["eq. 11", "no margin", "margin outside", "reference at first step", "through the sampler", "released"],
)
@pytest.mark.parametrize(("prompts", "n", "m"), [(1, 2, 1), (1, 3, 3), (4, 3, 3), (4, 2, 3)])
def test_two_pass_loss_and_gradient_equal_autograd_of_equation_11(double_pipeline, prompts, n, m, changes):
    schedule = double_schedule(double_pipeline)
    unet, condition, x_0, eps, t = problem(double_pipeline, prompts, n, torch.float64)
    reference = reference_of(unet)
    preference, _ = two_pass(unet, reference, condition, schedule, x_0, eps, t, n, m, **changes)
    ours = gradient(unet).clone()
    unet.zero_grad()
    expected = whole_objective(unet, reference, condition, x_0, eps, t, n, m, changes)
    expected.backward()
    assert float(preference.loss.mean()) == pytest.approx(float(expected.detach()), rel=1e-10)
    assert (ours - gradient(unet)).norm() <= 1e-10 * gradient(unet).norm()


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
    [{}, {"reward_margin": "outside"}, {"reward_margin_scale": 0.3}, {"beta_dpo": 900.0}, {"train_on": "best"}],
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


def test_best_alone_is_plain_regression_on_the_best_branch(pipeline):
    """Its gradient is that of the SFT objective on the same branches."""
    from train_sft_diffusion_sharpening_sdxl import sft_losses

    n, m = 3, 3
    schedule = Schedule.from_config(pipeline.scheduler.config, 25)
    unet, condition, x_0, eps, t = problem(pipeline, 4, n, torch.float64)
    preference, selection = two_pass(unet, unet, condition, schedule, x_0, eps, t, n, m, train_on="best")
    ours = gradient(unet).clone()
    best = torch.arange(4) * n + selection.best
    active = torch.stack([t[best] - 40 * k >= 0 for k in range(m)], 1)
    unconditional = sdxl.Unconditional(torch.zeros_like(condition.embeds[:1]), torch.zeros_like(condition.pooled[:1]))
    predict, guide = sdxl.branch_model(unet, condition, unconditional, 1.0)
    args, x_t = SimpleNamespace(**OPTIONS), schedule.add_noise(x_0, eps, t)
    unet.zero_grad(set_to_none=False)
    total = sum(sft_losses(args, predict, guide, schedule, x_t[best], t[best], x_0[best], eps[best], active))
    total.backward()
    assert float(preference.loss.mean()) == pytest.approx(float(total.detach()), rel=1e-6)
    assert (ours - gradient(unet)).norm() <= 1e-5 * gradient(unet).norm()


def test_swapping_best_and_worst_flips_the_log_ratio_term():
    errors, reference, active, rewards = pairs()
    ours = loss_of(errors, reference, active, rewards, reward_margin_scale=0.0)
    swapped = loss_of(errors.flip(1), reference.flip(1), active, rewards, reward_margin_scale=0.0)
    torch.testing.assert_close(swapped.logits, -ours.logits, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.loss - swapped.loss, -ours.logits, rtol=1e-12, atol=1e-15)


def test_swapping_flips_the_gradient_at_the_reference(double_pipeline):
    """Where model and reference agree, what is learned from a pair is the opposite of what its swap teaches."""
    schedule = double_schedule(double_pipeline)
    unet, condition, x_0, eps, t = problem(double_pipeline, 2, 3, torch.float64)
    gradients = []
    for swapped in (False, True):
        two_pass(unet, unet, condition, schedule, x_0, eps, t, 3, 3, swapped, reward_margin_scale=0.0)
        gradients.append(gradient(unet).clone())
    assert gradients[0].norm() > 0
    assert (gradients[0] + gradients[1]).norm() <= 1e-10 * gradients[0].norm()


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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_consistent_target_and_min_snr_reach_model_and_reference_alike(pipeline, prediction_type):
    """At the reference the log ratios are zero whatever the target and its weight."""
    schedule = Schedule.from_config(pipeline.scheduler.config, 25, prediction_type)
    unet, condition, x_0, eps, t = problem(pipeline, 4, 3, torch.float32)
    two_pass(unet, unet, condition, schedule, x_0, eps, t, 3, 3, batch_size=12)
    before = gradient(unet).clone()
    for changes in ({"branch_target": "consistent"}, {"snr_gamma": 5.0}):
        preference, _ = two_pass(unet, unet, condition, schedule, x_0, eps, t, 3, 3, batch_size=12, **changes)
        assert preference.log_ratios.abs().max() < 1e-5
        assert (gradient(unet) - before).norm() > 1e-3 * before.norm()


def test_permuting_prompts_permutes_pairs_and_keeps_the_gradient(pipeline):
    schedule = Schedule.from_config(pipeline.scheduler.config, 25)
    unet, condition, x_0, eps, t = problem(pipeline, 4, 3, torch.float64)
    reference = reference_of(unet)
    _, selection = two_pass(unet, reference, condition, schedule, x_0, eps, t, 3, 3)
    before = gradient(unet).clone()
    permutation = torch.tensor([2, 0, 3, 1])
    rows = (permutation[:, None] * 3 + torch.arange(3)).flatten()
    _, permuted = two_pass(unet, reference, condition.rows(permutation), schedule, x_0[rows], eps[rows], t[rows], 3, 3)
    assert torch.equal(permuted.best, selection.best[permutation])
    assert torch.equal(permuted.worst, selection.worst[permutation])
    assert (gradient(unet) - before).norm() <= 1e-5 * before.norm()


def test_peak_memory_is_flat_in_branches_and_steps(pipeline):
    schedule, unet = Schedule.from_config(pipeline.scheduler.config, 25), ConvolutionalDenoiser()
    peaks = {}

    def peak(n, m, **changes):
        _, condition, x_0, eps, t = problem(pipeline, 1, n, torch.float32, torch.tensor([981]), size=32)
        for parameter in unet.parameters():  # as in every optimizer step that accumulates
            parameter.grad = torch.zeros_like(parameter)
        with LiveMemory() as memory:
            two_pass(unet, unet, condition, schedule, x_0, eps, t, n, m, batch_size=1, **changes)
        return memory.peak

    for n in (2, 3, 8):
        for m in (1, 3, 8):
            peaks[n, m] = peak(n, m)
    # Three latents of 16 KB for each step of each branch are kept: 3 MB at n = m = 8, activations take 10.
    kept = 3 * 4 * 32 * 32 * 4
    activations = {(n, m): value - n * m * kept for (n, m), value in peaks.items()}
    assert max(activations.values()) <= 1.1 * min(activations.values()), peaks
    assert peak(8, 8, backprop_through_sampler=True) > 2 * max(peaks.values())
