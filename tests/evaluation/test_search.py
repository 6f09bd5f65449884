"""Inference-time search: exact cost, better than the base at equal seeds, and each method's own arithmetic."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler

from sharpening import sdxl
from sharpening.evaluation import search
from sharpening.trajectory import Model, Schedule, classifier_free_guidance, ddim_step
from tiny_world import shapes

CONFIG = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "leading",
}  # fmt: skip
STEPS = 10


def toy(prompts=3, guided=False, judge=None, size=6, seed=0):
    """A model of data N(mean_b, 1/4) for prompt b, whose exact noise estimate is linear; the reward is the mean."""
    schedule = Schedule.from_config(CONFIG, STEPS)
    means = torch.linspace(-1, 1, prompts)

    def model(rows):
        def predict(x, t):
            alpha, sigma = schedule.alpha_sigma(t, x)
            mean = means[rows].view(-1, 1, 1, 1)
            return sigma * (x - alpha * mean) / (alpha**2 / 4 + sigma**2)

        return Model(predict, classifier_free_guidance(predict, 2.0) if guided else None)

    judge = judge or (lambda latents, rows: latents.mean((1, 2, 3)))
    return search.Problem(model, judge, schedule, (1, size, size), [seed + b for b in range(prompts)])


# method, its arguments, UNet rows of one prompt and images judged of one prompt, with T = 10
METHODS = [
    (search.best_of_n, (1,), 10, 1),
    (search.best_of_n, (6,), 60, 6),
    (search.zero_order, (3, 4), (1 + 12) * 10, 13),
    (search.demon, (5,), 10 + 9 * 5, 9 * 5),
    (search.path_integral, (5,), 10 + 9 * 5, 9 * 5),
    (search.smc, (6,), 60, 60),
]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("method", "arguments", "rows", "judged"), METHODS)
def test_cost_is_what_the_docstring_says_and_what_the_model_saw(method, arguments, rows, judged, guided):
    problem = toy(guided=guided)
    seen = []
    model_of = problem.model_of

    def counted(index):
        predict, guide = model_of(index)

        def spy(x, t):
            seen.append(len(x))
            return predict(x, t)

        return Model(spy, guide)

    problem.model_of = counted
    latents = method(problem, *arguments)
    assert latents.shape == (3, 1, 6, 6)
    assert sum(seen) == 3 * rows and problem.rows == 3 * rows * (2 if guided else 1)
    assert problem.judged == 3 * judged


@pytest.mark.parametrize(("method", "arguments", "rows", "judged"), METHODS)
def test_a_prompt_is_searched_for_alike_alone_and_beside_others(method, arguments, rows, judged):
    together = method(toy(3), *arguments)
    problem = toy(3)
    problem.prompts, problem.generators = 1, problem.generators[:1]  # the first prompt alone
    torch.testing.assert_close(method(problem, *arguments), together[:1], rtol=1e-5, atol=1e-5)
    assert torch.equal(method(toy(3), *arguments), together)  # and again


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (search.best_of_n, (8,)), (search.zero_order, (4, 4)), (search.demon, (8,)),
        (search.path_integral, (8, 0.02)), (search.smc, (8, 0.02)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_search_raises_the_reward_of_a_known_model(method, arguments):
    prompts = 40
    plain, found = search.best_of_n(toy(prompts), 1), method(toy(prompts), *arguments)
    gain = found.mean((1, 2, 3)) - plain.mean((1, 2, 3))
    # The mean of 36 pixels of standard deviation 1/2 varies by 1/12; each method gains at least half of that.
    assert gain.mean() > 1 / 24 and gain.mean() > 3 * gain.std() / prompts**0.5


@pytest.mark.parametrize(("method", "arguments", "rows", "judged"), METHODS)
def test_reward_that_is_flat_or_fails_still_gives_images(method, arguments, rows, judged):
    for value in (1.0, math.nan):
        latents = method(toy(judge=lambda x, rows, value=value: torch.full((len(x),), value)), *arguments)
        assert latents.isfinite().all()


def test_image_without_a_score_is_never_chosen():
    problem = toy(judge=lambda x, rows: torch.where(torch.arange(len(x)) % 4 == 2, x.mean((1, 2, 3)), torch.nan))
    latents = search.best_of_n(problem, 4)
    other = toy()
    assert torch.equal(latents, other.generate(other.noise(4), 4)[2::4])


def test_zero_order_never_loses_what_it_found():
    judged = [
        toy().judge(search.zero_order(toy(), iterations, 3, 0.3), 1).flatten().tolist() for iterations in range(5)
    ]
    for before, after in itertools.pairwise(judged):
        assert all(b >= a for a, b in zip(before, after, strict=True))
    base = search.best_of_n(toy(), 1)
    assert torch.equal(search.zero_order(toy(), 0, 3), base)


@pytest.mark.parametrize(("method", "arguments", "rows", "judged"), METHODS)
def test_slices_change_nothing(method, arguments, rows, judged):
    whole, sliced = toy(), toy()
    sliced.batch_size = 2
    torch.testing.assert_close(method(sliced, *arguments), method(whole, *arguments), rtol=1e-5, atol=1e-5)
    assert (sliced.rows, sliced.judged) == (whole.rows, whole.judged)


@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("temperature", [0.01, 1e6])
def test_path_integral_adds_no_variance(candidates, temperature):
    """With rewards that mean nothing its samples spread as those of plain stochastic sampling do."""
    generator = torch.Generator().manual_seed(5)
    judge = lambda x, rows: torch.rand(len(x), generator=generator)  # noqa: E731
    spread = search.path_integral(toy(60, judge=judge, size=12), candidates, temperature).std()
    plain = search.smc(toy(60, size=12), 1).std()
    assert float(spread) == pytest.approx(float(plain), rel=0.02)


def test_stochastic_step_equals_diffusers():
    scheduler = DDIMScheduler.from_config(CONFIG, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    schedule = Schedule.from_config(CONFIG, STEPS)
    generator = torch.Generator().manual_seed(0)
    for timestep in schedule.timesteps.tolist():
        x, output, noise = torch.randn(3, 2, 4, 3, 3, generator=generator)
        t = torch.full((2,), timestep)
        ours = ddim_step(schedule, *schedule.clean_and_noise(output, x, t), t, noise)
        theirs = scheduler.step(output, timestep, x, eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_demon_combines_noises_by_the_tanh_of_standardised_rewards(monkeypatch):
    combined = []
    monkeypatch.setattr(search, "_steered", lambda problem, candidates, combine: combined.append(combine))
    search.demon(toy(), 3)
    noises, rewards = torch.randn(2, 3, 16), torch.tensor([[0.0, 1.0, 5.0], [2.0, 2.0, 2.0]])
    result = combined[0](noises, rewards)
    standardised = (rewards[0] - 2.0) / rewards[0].std(correction=0)
    total = (torch.tanh(standardised)[:, None] * noises[0]).sum(0)
    torch.testing.assert_close(result[0], total * 4 / total.norm())
    torch.testing.assert_close(result[1], noises[1, 0] * 4 / noises[1, 0].norm())  # nothing to choose by


def test_smc_resamples_only_when_the_weights_are_uneven(monkeypatch):
    """With a reward of one particle alone every ancestor is that particle; with equal rewards everyone goes on."""
    moved = []

    def record(schedule, x0_hat, *rest):
        moved.append(x0_hat)
        return ddim_step(schedule, x0_hat, *rest)

    monkeypatch.setattr(search, "ddim_step", record)
    for rewards, alike in (([0.0, 9.0, 0.0, 0.0], True), ([2.0, 2.0, 2.0, 2.0], False)):
        moved.clear()
        search.smc(toy(prompts=1, judge=lambda x, rows, rewards=rewards: torch.tensor(rewards)), 4)
        first = moved[0].flatten(1)
        assert all(torch.equal(first[0], row) for row in first) == alike
    assert len({tuple(row.tolist()) for row in first}) == 4


@pytest.fixture(scope="module")
def tiny(tiny_sdxl):
    """The trained tiny SDXL with the shapes reward: a problem to search, its judge, and its number of prompts."""
    captions = shapes.held_out_captions() * 4
    model = tiny_sdxl.model_of(captions)

    def judge(latents, rows):
        images = sdxl.decode_latents(tiny_sdxl.vae, latents, 128)
        return tiny_sdxl.reward.get_reward(images, [captions[row] for row in rows])

    def problem():
        return search.Problem(model, judge, tiny_sdxl.schedule, (4, 8, 8), range(len(captions)))

    return problem, judge, len(captions)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (search.best_of_n, (4,)), (search.zero_order, (2, 2)), (search.demon, (4,)), (search.path_integral, (4,)),
        (search.smc, (4,)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_search_beats_the_tiny_model_at_equal_seeds(method, arguments, tiny):
    problem, judge, count = tiny
    rows = torch.arange(count)
    base = judge(search.best_of_n(problem(), 1), rows)
    found = judge(method(problem(), *arguments), rows)
    gain = found - base
    assert gain.mean() > 0.05 and gain.mean() > 2 * gain.std() / count**0.5, (gain.mean(), base.mean())
