"""Latents that outlive the step that made them: which prompts they fit."""

import pytest
import torch

from sharpening.generation import Generation, generate_in_slices
from sharpening.trajectory import Model, Schedule, generate
from tests.support.objective import SDXL

SHAPE = (2, 4, 2, 2)


def batch(*prompts):
    return {"caption": list(prompts), "draw": torch.arange(len(prompts))}


FIRST, SECOND = batch("a cat", "a dog"), batch("a cow", "a hen")


def test_new_prompts_have_no_latents_until_some_are_kept():
    generation = Generation()
    assert not generation.begin(FIRST, SHAPE)
    assert generation.batch == FIRST and generation.made == []
    generation.keep(torch.ones(SHAPE))
    assert generation.made[0]["prompts"] == ["a cat", "a dog"]
    assert torch.equal(generation.latents, torch.ones(SHAPE))


def test_a_new_generation_forgets_what_earlier_latents_earned():
    generation = Generation()
    generation.begin(FIRST, SHAPE)
    generation.scores = "scores of the first"
    generation.begin(SECOND, SHAPE)
    assert generation.scores is None and generation.batch == SECOND


def test_latents_of_a_checkpoint_fit_their_own_prompts(caplog):
    """`made` is what a checkpoint keeps and fills again, so it must stay the same list."""
    generation = Generation()
    kept = generation.made
    generation.begin(FIRST, SHAPE)
    generation.keep(torch.zeros(SHAPE))
    assert generation.begin(FIRST, SHAPE)
    assert generation.made is kept and len(kept) == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("one", "shape"),
    [
        (batch("a dog", "a cat"), SHAPE),
        (batch("a cat"), SHAPE),
        (batch("a cat", "a dog", "a cat"), SHAPE),
        (batch("a cat", "a fox"), SHAPE),
        (FIRST, (4, *SHAPE[1:])),
        (FIRST, (*SHAPE[:2], 4, 4)),
    ],
    ids=["another order", "fewer", "more", "another prompt", "more latents per prompt", "another resolution"],
)
def test_latents_of_a_checkpoint_fit_nothing_else(one, shape, caplog):
    generation = Generation()
    generation.begin(FIRST, SHAPE)
    generation.keep(torch.zeros(SHAPE))
    assert not generation.begin(one, shape)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "generated anew" in record.message


def test_latents_in_parts_as_older_checkpoints_keep_them_are_warned_of(caplog):
    """One part for every micro-batch of an accumulated step."""
    generation = Generation()
    generation.made[:] = [{"prompts": [prompt], "latents": torch.zeros(1, *SHAPE[1:])} for prompt in FIRST["caption"]]
    assert not generation.begin(FIRST, SHAPE)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "generated anew" in record.message


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_slices_generate_what_one_batch_does_each_row_with_its_own_model(batch_size):
    schedule = Schedule.from_config(SDXL, 4)
    scale = torch.arange(1, 6, dtype=torch.float64)[:, None] / 10
    noise = torch.randn(5, 3, dtype=torch.float64)

    def model_of(rows):
        return Model(lambda x, t: torch.tanh(scale[rows] * x))

    latents = generate_in_slices(model_of, schedule, noise, batch_size)
    for row in range(5):
        index = torch.tensor([row])
        torch.testing.assert_close(latents[index], generate(model_of(index), schedule, noise[index]))


def test_generation_keeps_no_gradient():
    weight = torch.tensor(0.5, requires_grad=True)
    latents = generate_in_slices(
        lambda rows: Model(lambda x, t: weight * x), Schedule.from_config(SDXL, 2), torch.randn(2, 3), 2
    )
    assert not latents.requires_grad
