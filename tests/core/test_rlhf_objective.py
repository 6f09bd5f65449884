"""The objective of the RLHF script: loss and gradient against float64 autograd, any slicing, and flat memory."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from benchmarks.memory import LiveMemory
from sharpening import sdxl
from sharpening.regression import Preference, Regression
from sharpening.selection import begin_samples, score_branches, select
from sharpening.trajectory import Branches, Schedule, outputs_through_sampler, walk_path
from sharpening.transfer import slices
from tests.support.objective import (
    ConvolutionalDenoiser,
    denoiser,
    double_precision,
    double_schedule,
    gradient,
    problem,
)
from tiny_world.make_tiny_sdxl import make_pipeline
from train_rlhf_diffusion_sharpening_sdxl import one_forward_trains, preference_loss

OPTIONS = {
    "backprop_through_sampler": False, "reward_on": "trajectory", "beta_dpo": 30.0, "reward_margin_scale": 1.0,
    "reward_margin": "inside", "reference_steps": "all", "train_rows": 2, "score_batch_size": 2,
    "worst_ratio_bound": math.inf,
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


def sample_problem(pipeline, prompts, n, dtype, t=None):
    """As `problem`, with latents of each branch's own: two samples of a prompt differ."""
    unet, condition, x_0, eps, t = problem(pipeline, prompts, n, dtype, t)
    return unet, condition, x_0 + eps.flip(0), eps, t


def reward_of(x_0):
    return 10 * x_0.mean((1, 2, 3))


def judge(latents, rows):
    return lambda: (reward_of(latents).float(), {})


def train(unet, reference, condition, regression, x_0, eps, t, n, m, swapped=False, **changes):
    """SCORE, SELECT, COMPARE and TRAIN as the script does them; the gradient is left in the parameters."""
    prompts, schedule = len(t) // n, regression.schedule
    args = SimpleNamespace(**{**OPTIONS, "train_batch_size": prompts, "trajectory_nums": m, **changes})
    branches = Branches.begin(schedule, x_0, eps, t)
    of_branches = condition.rows(torch.arange(len(t)) // n)
    if args.reward_on == "trajectory":
        walking = denoiser(unet, of_branches)
        scores, path = score_branches(walking.rows, judge, schedule, branches, m, args.score_batch_size)
    else:
        scores = begin_samples(judge, x_0, args.score_batch_size)()
    selection = select(scores.rewards, scores.active, n)
    best_and_worst = [selection.best_rows, selection.worst_rows]
    rows = torch.stack(best_and_worst[::-1] if swapped else best_and_worst, 1).flatten()
    rewards = selection.branch_reward.flatten()[rows].view(-1, 2).to(x_0.dtype)
    pairs, of_pairs, at_once = branches.rows(rows), condition.repeat(2), one_forward_trains(args)
    if args.reward_on == "trajectory":
        path = path.rows(rows)
    else:
        walking = denoiser(unet, of_pairs)
        path = walk_path(walking.rows, schedule, pairs, m, args.score_batch_size, outputs=not at_once)
    measured = path if args.reference_steps == "all" else path.first(1)
    with torch.no_grad():
        reference_output = sdxl.predict_along(reference, measured, of_pairs, args.train_rows)
    reference_errors = regression.errors(pairs, measured, reference_output)
    unet.zero_grad(set_to_none=False)
    losses = []
    for some in slices(prompts, max(1, args.train_rows // (2 * m)) if at_once else prompts):
        part = slice(2 * some.start, 2 * some.stop)
        part_of_pairs, of_part = pairs.rows(part), path.rows(part)
        with torch.set_grad_enabled(at_once):
            if args.backprop_through_sampler:
                walking = denoiser(unet, of_pairs).rows(part)
                output = outputs_through_sampler(walking, schedule, part_of_pairs, m)
            elif path.output is None:
                output = sdxl.predict_along(unet, of_part, of_pairs.rows(part))
            else:
                output = of_part.output
            errors = regression.errors(part_of_pairs, of_part, output)
            of_pair = (errors.detach(), reference_errors[part], of_part.active)
            of_pair = (each.unflatten(0, (-1, 2)) for each in of_pair)
            preference = preference_loss(args, *of_pair, rewards[some], selection.decided[some])
            weights = preference.weights.flatten(0, 1) * ((some.stop - some.start) / prompts)
            if at_once:
                (weights * errors).sum().backward()
        losses.append(preference)
    preference = Preference(*(torch.cat(each) for each in zip(*(one[:3] for one in losses), strict=True)))
    if not at_once:
        for part in regression.rows(pairs, path, of_pairs, weights).split(args.train_rows):
            part.loss(sdxl.predict_output(unet, part.x, part.t, part.condition)).backward()
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
            if args.reward_on == "sample":
                rewards = [float(reward_of(x_0[row][None]))]
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


SAMPLES = {"reward_on": "sample"}
AT_ONCE = {**SAMPLES, "train_rows": 100}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reward_margin_scale": 0.0},
        {"reward_margin": "outside"},
        {"reference_steps": "first"},
        {"backprop_through_sampler": True},
        {"reward_margin": "outside", "reference_steps": "first", "backprop_through_sampler": True},
        SAMPLES,
        AT_ONCE,
        {**AT_ONCE, "reference_steps": "first"},
        {**SAMPLES, "backprop_through_sampler": True},
    ],
    ids=[
        "eq. 11", "no margin", "margin outside", "reference at first step", "through the sampler", "released",
        "samples", "samples in one forward", "samples, reference at first step", "samples through the sampler",
    ],
)  # fmt: skip
@pytest.mark.parametrize(("prompts", "n", "m"), [(1, 2, 1), (1, 3, 3), (4, 3, 3), (4, 2, 3)])
def test_loss_and_gradient_equal_autograd_of_equation_11(double_pipeline, prompts, n, m, changes):
    make = sample_problem if "reward_on" in changes else problem
    unet, condition, x_0, eps, t = make(double_pipeline, prompts, n, torch.float64)
    reference, regression = reference_of(unet), Regression(double_schedule(double_pipeline))
    preference, _ = train(unet, reference, condition, regression, x_0, eps, t, n, m, **changes)
    ours = gradient(unet).clone()
    unet.zero_grad()
    expected = whole_objective(unet, reference, condition, x_0, eps, t, n, m, changes)
    expected.backward()
    assert float(preference.loss.mean()) == pytest.approx(float(expected.detach()), rel=1e-10)
    assert (ours - gradient(unet)).norm() <= 1e-10 * gradient(unet).norm()


@pytest.mark.parametrize("options", [{}, {"kind": "consistent", "snr_gamma": 5.0}], ids=["published", "consistent"])
@pytest.mark.parametrize("changes", [{}, SAMPLES], ids=["trajectory", "sample"])
def test_any_slicing_gives_one_gradient(double_pipeline, changes, options):
    """All rows in one slice is, where samples are judged, the way of one forward: it equals that of two."""
    unet, condition, x_0, eps, t = sample_problem(double_pipeline, 4, 3, torch.float64)
    reference, regression = reference_of(unet), Regression(double_schedule(double_pipeline), **options)

    def run(train_rows):
        given = (unet, reference, condition, regression, x_0, eps, t, 3, 3)
        preference, selection = train(*given, **changes, train_rows=train_rows)
        assert selection.decided.all()
        return preference.loss, gradient(unet).clone()

    loss, expected = run(100)
    assert expected.norm() > 0
    for train_rows in (1, 3, 23):  # 24 states, of which some are inactive
        sliced, ours = run(train_rows)
        torch.testing.assert_close(sliced, loss, rtol=1e-10, atol=0)
        assert (ours - expected).norm() <= 1e-10 * expected.norm()


def test_one_forward_trains_where_samples_are_judged_and_a_pair_fits_one_slice():
    def of(**changes):
        return one_forward_trains(
            SimpleNamespace(**{**OPTIONS, "train_batch_size": 2, "trajectory_nums": 3, **changes})
        )

    assert of(**SAMPLES, train_rows=6) and not of(**SAMPLES, train_rows=5)
    assert not of(train_rows=12) and of(backprop_through_sampler=True, train_rows=1)


def test_swapping_flips_the_gradient_at_the_reference(double_pipeline):
    """Where model and reference agree, what is learned from a pair is the opposite of what its swap teaches."""
    unet, condition, x_0, eps, t = problem(double_pipeline, 2, 3, torch.float64)
    regression, gradients = Regression(double_schedule(double_pipeline)), []
    for swapped in (False, True):
        train(unet, unet, condition, regression, x_0, eps, t, 3, 3, swapped, reward_margin_scale=0.0)
        gradients.append(gradient(unet).clone())
    assert gradients[0].norm() > 0
    assert (gradients[0] + gradients[1]).norm() <= 1e-10 * gradients[0].norm()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_consistent_target_and_min_snr_reach_model_and_reference_alike(pipeline, prediction_type):
    """At the reference the log ratios are zero whatever the target and its weight."""
    schedule = Schedule.from_config(pipeline.scheduler.config, 25, prediction_type)
    unet, *given = problem(pipeline, 4, 3, torch.float32)
    condition, *branches = given

    def run(**options):
        regression = Regression(schedule, **options)
        preference, _ = train(unet, unet, condition, regression, *branches, 3, 3, score_batch_size=12)
        assert preference.log_ratios.abs().max() < 1e-5
        return gradient(unet).clone()

    before = run()
    for options in ({"kind": "consistent"}, {"snr_gamma": 5.0}):
        assert (run(**options) - before).norm() > 1e-3 * before.norm()


def test_permuting_prompts_permutes_pairs_and_keeps_the_gradient(pipeline):
    regression = Regression(Schedule.from_config(pipeline.scheduler.config, 25))
    unet, condition, x_0, eps, t = problem(pipeline, 4, 3, torch.float64)
    reference = reference_of(unet)
    _, selection = train(unet, reference, condition, regression, x_0, eps, t, 3, 3)
    before = gradient(unet).clone()
    permutation = torch.tensor([2, 0, 3, 1])
    rows = (permutation[:, None] * 3 + torch.arange(3)).flatten()
    given = (condition.rows(permutation), regression, x_0[rows], eps[rows], t[rows])
    _, permuted = train(unet, reference, *given, 3, 3)
    assert torch.equal(permuted.best, selection.best[permutation])
    assert torch.equal(permuted.worst, selection.worst[permutation])
    assert (gradient(unet) - before).norm() <= 1e-5 * before.norm()


@pytest.mark.parametrize("changes", [{}, SAMPLES], ids=["trajectory", "sample"])
def test_peak_memory_is_flat_in_branches_and_steps_and_grows_with_rows_alone(pipeline, changes):
    unet = ConvolutionalDenoiser()
    regression = Regression(Schedule.from_config(pipeline.scheduler.config, 25))

    def peak(n, m, train_rows=1, **others):
        _, condition, x_0, eps, t = problem(pipeline, 1, n, torch.float32, torch.tensor([981]), size=32)
        for parameter in unet.parameters():  # as in every optimizer step that accumulates
            parameter.grad = torch.zeros_like(parameter)
        options = {**changes, **others, "train_rows": train_rows, "score_batch_size": 1}
        with LiveMemory() as memory:
            train(unet, unet, condition, regression, x_0, eps, t, n, m, **options)
        return memory.peak

    for train_rows, steps in ((1, (1, 3, 8)), (3, (3, 8))):
        peaks = {(n, m): peak(n, m, train_rows) for n in (2, 3, 8) for m in steps}
        assert max(peaks.values()) <= 1.1 * min(peaks.values()), peaks
        # The measure does see what rows and a joint graph cost.
        assert min(peaks.values()) > 0.8 * train_rows * peak(2, 1)
        assert peak(3, 8, train_rows, backprop_through_sampler=True) > 1.5 * max(peaks.values())
