"""Which row every draw shows, and what is drawn for it: by its number alone."""

from collections import Counter

import pytest
import torch

from sharpening.draws import Draws, DrawSampler, draw_generator, draw_noise, timestep_probabilities


def sampler(num_rows, batch_size=1, rank=0, world_size=1, seed=0, start_step=0, num_steps=10):
    return DrawSampler(
        num_rows,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        start_step=start_step,
        num_steps=num_steps,
    )


def test_every_epoch_shows_every_row_once_and_batches_straddle_epochs():
    draws = [draw for batch in sampler(7, batch_size=4, num_steps=14) for draw in batch]
    assert [number for _, number in draws] == list(range(56))
    epochs = [tuple(row for row, _ in draws[start : start + 7]) for start in range(0, 56, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_a_step_may_hold_several_epochs():
    batches = list(sampler(3, batch_size=8, num_steps=2))
    assert [len(batch) for batch in batches] == [8, 8]
    assert Counter(row for batch in batches for row, _ in batch).most_common()[-1][1] == 5


def step_sets(num_steps=5, **options):
    """The set of draws of every optimizer step, over all ranks."""
    steps = [set() for _ in range(num_steps)]
    for rank in range(options.get("world_size", 1)):
        for number, batch in enumerate(sampler(11, rank=rank, num_steps=num_steps, **options)):
            steps[number].update(batch)
    return steps


def test_the_draws_of_a_step_depend_on_their_number_alone():
    expected = step_sets(batch_size=8)
    assert all(len(step) == 8 for step in expected)
    for batch_size, world_size in ((4, 2), (2, 4), (1, 8)):
        assert step_sets(batch_size=batch_size, world_size=world_size) == expected


def test_a_resumed_sampler_yields_the_remaining_batches():
    options = {"batch_size": 3, "world_size": 2, "rank": 1, "num_steps": 9}
    whole = list(sampler(5, **options))
    for start in (0, 4, 9):
        rest = sampler(5, start_step=start, **options)
        assert list(rest) == whole[start:] and len(rest) == 9 - start


def test_generators_are_stable_and_independent():
    # Written down once: a resumed run must draw the same numbers in another process and under another version.
    assert draw_generator(0, 0, "noise").initial_seed() == 7012560265599635137
    seeds = {draw_generator(s, d, name).initial_seed() for s in range(3) for d in range(500) for name in "ab"}
    assert len(seeds) == 3000
    a, b, c = (torch.randn(20_000, generator=draw_generator(*key)) for key in ((0, 1, "a"), (0, 1, "b"), (0, 2, "a")))
    for x, y in ((a, b), (a, c), (b, c)):
        assert abs(float((x * y).mean())) < 4 / 20_000**0.5
    first = torch.cat([torch.randn(1, generator=draw_generator(0, draw, "a")) for draw in range(2000)])
    assert abs(float(first.mean())) < 0.1 and abs(float(first.std()) - 1) < 0.1


SHAPE = (4, 2, 2)
UNIFORM = timestep_probabilities(1000)


def test_what_is_drawn_depends_on_the_draw_and_not_on_its_neighbours():
    draws = Draws(3, UNIFORM, noise_offset=0.1, drop=0.5)
    together, apart = draws.noising(range(40), 2, SHAPE), [draws.noising([draw], 2, SHAPE) for draw in range(40)]
    for name in ("eps", "t", "dropped"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(one, name) for one in apart]))
    assert together.eps.shape == (40, 2, *SHAPE) and len(set(together.t.tolist())) > 30
    assert 8 < int(together.dropped.sum()) < 32
    other = Draws(4, UNIFORM).noising(range(40), 2, SHAPE)
    assert not torch.equal(other.eps, together.eps) and not torch.equal(other.t, together.t)


def test_more_branches_leave_the_first_ones_as_they_are():
    one, three = (Draws(0, UNIFORM).noising([7], n, SHAPE).eps for n in (1, 3))
    assert torch.equal(three[:, :1], one) and not torch.equal(three[:, 1:2], one)


def test_offset_is_one_constant_for_each_noise_and_channel():
    plain, moved = (Draws(0, UNIFORM, noise_offset=scale).noising([1], 2, SHAPE).eps for scale in (0.0, 0.5))
    offset = moved - plain
    torch.testing.assert_close(offset, offset[..., :1, :1].expand_as(offset))
    assert len(set((offset[0, :, :, 0, 0] * 1e4).round().flatten().tolist())) == 8


def test_nothing_is_dropped_unless_asked_and_everything_at_one():
    assert not Draws(0, UNIFORM).noising(range(50), 1, SHAPE).dropped.any()
    assert Draws(0, UNIFORM, drop=1.0).noising(range(50), 1, SHAPE).dropped.all()


def test_noise_of_a_generation_is_that_of_its_key():
    by_draw, by_prompt = draw_noise(0, [3, 4], 2, SHAPE), draw_noise(0, ["a cat", "a dog", "a cat"], 2, SHAPE)
    assert by_draw.shape == (2, 2, *SHAPE) and torch.equal(by_draw[1:], draw_noise(0, [4], 2, SHAPE))
    assert torch.equal(by_prompt[0], by_prompt[2]) and not torch.equal(by_prompt[0], by_prompt[1])
    assert not torch.equal(by_draw[0, 0], Draws(0, UNIFORM).noising([3], 1, SHAPE).eps[0, 0])


@pytest.mark.parametrize(
    ("options", "favoured"),
    [
        (("none", 5.0), range(0)),
        (("earlier", 5.0, 0.3), range(300)),
        (("later", 5.0, 0.3), range(700, 1000)),
        (("range", 5.0, 0.3, 10, 20), range(10, 20)),
    ],
)
def test_favoured_timesteps_are_the_multiplier_times_as_likely(options, favoured):
    probabilities = timestep_probabilities(1000, *options)
    assert float(probabilities.sum()) == pytest.approx(1)
    ratios = (probabilities / probabilities.min()).tolist()
    assert ratios == pytest.approx([5.0 if step in favoured else 1.0 for step in range(1000)], rel=1e-5)
