"""Samples of a model that does not change: drawn once, judged once, whatever their order and their company."""

import pytest
import torch

from sharpening import sdxl
from sharpening.generation import SampleSets
from sharpening.trajectory import Schedule
from tests.support.objective import double_precision
from tiny_world.make_tiny_sdxl import make_pipeline

SHAPE = (4, 4, 4)
PROMPTS = ["a red circle", "a blue square", "a green triangle"]


@pytest.fixture(scope="module")
def pipeline():
    return double_precision(make_pipeline(seed=0))


@pytest.fixture(scope="module")
def schedule(pipeline):
    return Schedule.from_config(pipeline.scheduler.config, 2)


@pytest.fixture
def denoiser(pipeline):
    """A guided denoiser of some of `PROMPTS`, which counts the rows that it is asked for."""
    generator = torch.Generator().manual_seed(0)
    width, pooled = pipeline.unet.config.cross_attention_dim, pipeline.text_encoder_2.config.projection_dim
    embeds, pooled = torch.randn(3, 77, width, generator=generator), torch.randn(3, pooled, generator=generator)
    condition = sdxl.Condition(embeds, pooled, sdxl.default_time_ids(3, 16, torch.device("cpu")))
    unconditional = sdxl.Unconditional(torch.zeros_like(embeds[:1]), torch.zeros_like(pooled[:1]))
    rows = []
    handle = pipeline.unet.register_forward_hook(lambda unet, args, output: rows.append(len(args[0])))

    def of(*prompts):
        index = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
        return sdxl.Denoiser(pipeline.unet, condition.rows(index), unconditional, 3.0)

    of.rows = rows
    yield of
    handle.remove()


def sample_sets(sets=1, rows=3, n=2, seed=0):
    return SampleSets(sets, rows, n, SHAPE, seed)


def of_prompts(prompts, begin, n=2):
    """A judge of rows, n of them for each prompt, by one that is told the prompts."""
    return lambda latents, rows: begin(latents, [prompts[row // n] for row in rows])


def judge(latents, prompts):
    return lambda: (latents.mean((1, 2, 3)).float(), {"length": torch.tensor([float(len(p)) for p in prompts])})


def test_samples_of_a_key_are_drawn_once_with_guidance(denoiser, schedule):
    samples = sample_sets()
    keys = samples.keys([0, 1], PROMPTS[:2])
    samples.draw(keys, denoiser(*PROMPTS[:2]), schedule, 8)
    assert denoiser.rows == [8] * 2  # two steps of n = 2 latents of both keys, with and without the prompt
    before = samples.latents(keys)
    assert before.shape == (4, *SHAPE) and before.device.type == "cpu"
    samples.draw(samples.keys([3, 5, 4], [PROMPTS[1], PROMPTS[2], PROMPTS[0]]), denoiser(*PROMPTS), schedule, 1)
    assert denoiser.rows == [8] * 2 + [2] * 4  # of the third prompt alone, one latent at a time
    assert torch.equal(samples.latents(keys), before)


@pytest.mark.parametrize("batch_size", [4, 8])
def test_samples_do_not_depend_on_order_or_company(batch_size, denoiser, schedule):
    together, alone = sample_sets(n=3), sample_sets(n=3)
    keys = together.keys([0, 1, 2], PROMPTS)
    together.draw(keys, denoiser(*PROMPTS), schedule, batch_size)
    # A slice is filled with the next key's samples; guidance doubles its rows.
    assert denoiser.rows == [rows for rows in {4: (8, 8, 2), 8: (16, 2)}[batch_size] for _ in range(2)]
    for prompt, key in reversed([*zip(PROMPTS, keys, strict=True)]):
        alone.draw([key], denoiser(prompt), schedule, batch_size)
    torch.testing.assert_close(together.latents(keys), alone.latents(keys), rtol=1e-4, atol=1e-5)
    reversed_order = together.latents(keys).unflatten(0, (3, 3)).flip(0).flatten(0, 1)
    assert torch.equal(together.latents(keys[::-1]), reversed_order)


def test_a_key_twice_in_a_batch_is_drawn_and_judged_once(denoiser, schedule):
    samples, calls = sample_sets(rows=1), []
    keys = samples.keys([0, 1], [PROMPTS[0], PROMPTS[0]])
    assert keys[0] == keys[1]
    samples.draw(keys, denoiser(PROMPTS[0], PROMPTS[0]), schedule, 8)
    assert denoiser.rows == [4] * 2
    begin = of_prompts([PROMPTS[0]] * 2, lambda *given: calls.append(given) or judge(*given))
    samples.judge(keys, begin, 8)
    assert len(calls) == 1
    scores = samples.scores(keys)
    assert scores.rewards.shape == scores.active.shape == (4, 1) and torch.equal(
        scores.rewards[:2], scores.rewards[2:]
    )


def test_every_epoch_shows_the_next_set_and_then_the_first_again(denoiser, schedule):
    samples = sample_sets(sets=2)
    of_draw = [samples.keys([draw], [PROMPTS[0]])[0] for draw in range(9)]
    assert of_draw[0] == of_draw[1] == of_draw[2] == of_draw[6] == of_draw[8] != of_draw[3]
    assert of_draw[3] == of_draw[4] == of_draw[5]
    samples.draw([of_draw[0], of_draw[3]], denoiser(PROMPTS[0], PROMPTS[0]), schedule, 8)
    first, second = samples.latents([of_draw[0], of_draw[3]]).unflatten(0, (2, 2))
    assert not torch.allclose(first, second, atol=0.1)


def test_another_seed_and_another_round_draw_other_samples(denoiser, schedule):
    samples, other = sample_sets(), sample_sets(seed=1)
    latents = []
    for sets, number in ((samples, 0), (samples, 1), (other, 0)):
        sets.begin_round(number)
        keys = sets.keys([0], [PROMPTS[0]])
        sets.draw(keys, denoiser(PROMPTS[0]), schedule, 8)
        latents.append(sets.latents(keys))
    assert not any(torch.allclose(latents[i], latents[j], atol=0.1) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_new_round_forgets_samples_and_scores(denoiser, schedule):
    samples = sample_sets()
    keys = samples.keys([0], PROMPTS[:1])
    samples.draw(keys, denoiser(PROMPTS[0]), schedule, 8)
    samples.judge(keys, of_prompts(PROMPTS[:1], judge), 8)
    samples.begin_round(0)
    assert samples.latents(keys).shape == (2, *SHAPE) and samples.scores(keys).active.all()  # it is this round still
    samples.begin_round(1)
    with pytest.raises(KeyError):
        samples.latents(keys)
    samples.draw(keys, denoiser(PROMPTS[0]), schedule, 8)
    with pytest.raises(KeyError):
        samples.scores(keys)


def test_a_run_that_begins_amid_a_round_draws_the_samples_of_that_round(denoiser, schedule):
    whole, resumed = sample_sets(), sample_sets()
    whole.draw(whole.keys([0], PROMPTS[:1]), denoiser(PROMPTS[0]), schedule, 8)
    for samples in (whole, resumed):
        samples.begin_round(1)
        samples.draw(samples.keys([0], PROMPTS[:1]), denoiser(PROMPTS[0]), schedule, 8)
    (key,) = whole.keys([0], PROMPTS[:1])
    assert torch.equal(whole.latents([key]), resumed.latents([key]))


def test_samples_are_judged_once_with_their_prompt_in_slices(denoiser, schedule):
    samples, calls = sample_sets(n=3), []

    def begin(latents, prompts):
        calls.append((latents, prompts))
        return judge(latents, prompts)

    keys = samples.keys([0, 1], PROMPTS[:2])
    samples.draw(keys, denoiser(*PROMPTS[:2]), schedule, 8)
    samples.judge(keys, of_prompts(PROMPTS[:2], begin, n=3), 2)
    assert [prompts for _, prompts in calls] == [
        [PROMPTS[0]] * 2, [PROMPTS[0]], [PROMPTS[1]] * 2, [PROMPTS[1]],
    ]  # fmt: skip
    assert torch.equal(torch.cat([latents for latents, _ in calls]), samples.latents(keys))
    samples.judge(keys[::-1], of_prompts(PROMPTS[1::-1], begin, n=3), 2)
    assert len(calls) == 4
    scores = samples.scores(keys[::-1])
    expected = samples.latents(keys[::-1])
    torch.testing.assert_close(scores.rewards[:, 0], expected.mean((1, 2, 3)))
    assert torch.equal(scores.last_estimate, expected) and scores.active.all()
    assert scores.components["length"][:, 0].tolist() == [len(PROMPTS[1])] * 3 + [len(PROMPTS[0])] * 3


def test_samples_without_a_score_are_judged_again_and_only_they(denoiser, schedule):
    samples, calls = sample_sets(), []
    broken = {PROMPTS[0]}

    def begin(latents, prompts):
        calls.append(prompts[0])
        total, parts = judge(latents, prompts)()
        if prompts[0] in broken:
            return lambda: (torch.stack([total[0], torch.tensor(torch.nan)]), {})
        return lambda: (total, parts)

    keys = samples.keys([0, 1], PROMPTS[:2])
    samples.draw(keys, denoiser(*PROMPTS[:2]), schedule, 8)
    samples.judge(keys, of_prompts(PROMPTS[:2], begin), 8)
    scores = samples.scores(keys)
    assert scores.rewards.isnan().flatten().tolist() == [False, True, False, False]
    # A component that one prompt's verdict lacks has no value there.
    assert scores.components["length"].isnan().flatten().tolist() == [True, True, False, False]
    broken.clear()
    samples.judge(keys, of_prompts(PROMPTS[:2], begin), 8)
    assert calls == [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    assert not samples.scores(keys).rewards.isnan().any()


def test_a_failing_judge_is_waited_for_and_leaves_what_was_judged_before(denoiser, schedule):
    """No verdict of a failed batch is kept, so that a repetition asks for all of it; none is left under way."""
    samples, waited = sample_sets(), []

    def begin(latents, prompts):
        def wait():
            waited.append(prompts[0])
            if prompts[0] == PROMPTS[1]:
                raise OSError("no answer")
            return judge(latents, prompts)()

        return wait

    keys = samples.keys([0, 1, 2], PROMPTS)
    samples.draw(keys, denoiser(*PROMPTS), schedule, 8)
    samples.judge(keys[:1], of_prompts(PROMPTS[:1], begin), 8)
    before = samples.scores(keys[:1]).rewards
    with pytest.raises(OSError, match="no answer"):
        samples.judge(keys, of_prompts(PROMPTS, begin), 8)
    assert waited == [PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    assert torch.equal(samples.scores(keys[:1]).rewards, before)
    with pytest.raises(KeyError):
        samples.scores(keys[2:])


def test_all_processes_draw_as_many_slices_as_the_one_that_lacks_most(denoiser, schedule):
    samples, agreed = sample_sets(), []

    def agree(count):
        agreed.append(count)
        return 2

    keys = samples.keys([0, 1], PROMPTS[:2])
    samples.draw(keys[:1], denoiser(PROMPTS[0]), schedule, 2, agree)
    first = samples.latents(keys[:1]).clone()
    assert len(denoiser.rows) == 2 * 2  # two slices of two steps
    samples.draw(keys[:1], denoiser(PROMPTS[0]), schedule, 2, agree)
    assert len(denoiser.rows) == 4 * 2 and torch.equal(samples.latents(keys[:1]), first)
    samples.draw(keys, denoiser(*PROMPTS[:2]), schedule, 2, agree)
    assert agreed == [1, 0, 1] and len(samples.latents(keys)) == 4
    alone = sample_sets()
    alone.draw(keys, denoiser(*PROMPTS[:2]), schedule, 2)
    torch.testing.assert_close(samples.latents(keys), alone.latents(keys))
