"""Which row every draw shows, and what is drawn for it: by its number alone."""

from collections import Counter

import torch

from sharpening.draws import DrawSampler, draw_generator


def sampler(num_rows, batch_size=1, rank=0, world_size=1, accumulation_steps=1, seed=0, start_step=0, num_steps=10):
    return DrawSampler(
        num_rows,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
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
    world_size, accumulation = options.get("world_size", 1), options.get("accumulation_steps", 1)
    steps = [set() for _ in range(num_steps)]
    for rank in range(world_size):
        for number, batch in enumerate(sampler(11, rank=rank, num_steps=num_steps, **options)):
            steps[number // accumulation].update(batch)
    return steps


def test_the_draws_of_a_step_depend_on_their_number_alone():
    expected = step_sets(batch_size=8)
    assert all(len(step) == 8 for step in expected)
    for batch_size, accumulation, world_size in ((1, 8, 1), (2, 4, 1), (1, 4, 2), (4, 1, 2), (1, 1, 8), (2, 2, 2)):
        options = {"batch_size": batch_size, "accumulation_steps": accumulation, "world_size": world_size}
        assert step_sets(**options) == expected


def test_a_resumed_sampler_yields_the_remaining_batches():
    options = {"batch_size": 3, "accumulation_steps": 2, "world_size": 2, "rank": 1, "num_steps": 9}
    whole = list(sampler(5, **options))
    for start in (0, 4, 9):
        rest = sampler(5, start_step=start, **options)
        assert list(rest) == whole[2 * start :] and len(rest) == 2 * (9 - start)


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
