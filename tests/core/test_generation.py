"""Latents that outlive the step that made them: which batches they fit, and what is said if they are spoiled."""

import pytest
import torch

from sharpening.generation import Generations, generate_in_slices, not_finite
from sharpening.trajectory import Model, Schedule, generate
from tests.support.objective import SDXL

SHAPE = (2, 4, 2, 2)


def batch(*prompts):
    return {"caption": list(prompts), "draw": torch.arange(len(prompts))}


FIRST, SECOND = batch("a cat", "a dog"), batch("a cow", "a hen")


def test_new_prompts_have_no_latents_and_get_them_one_micro_batch_after_the_other():
    generations = Generations()
    assert not generations.begin([FIRST, SECOND], SHAPE)
    assert generations.batches == [FIRST, SECOND] and generations.made == []
    generations.add(FIRST["caption"], torch.zeros(SHAPE))
    generations.add(SECOND["caption"], torch.ones(SHAPE))
    assert [entry["prompts"] for entry in generations.made] == [["a cat", "a dog"], ["a cow", "a hen"]]
    assert [float(entry["latents"].mean()) for entry in generations.made] == [0, 1]


def test_a_new_generation_forgets_what_earlier_latents_earned():
    generations = Generations()
    generations.begin([FIRST], SHAPE)
    generations.scores.append("scores of the first")
    generations.begin([SECOND], SHAPE)
    assert generations.scores == [] and generations.batches == [SECOND]


def test_latents_of_a_checkpoint_fit_their_own_prompts_in_their_own_order():
    """`made` is what a checkpoint keeps and fills again, so it must stay the same list."""
    generations = Generations()
    kept = generations.made
    for one in (FIRST, SECOND):
        generations.add(one["caption"], torch.zeros(SHAPE))
    assert generations.begin([FIRST, SECOND], SHAPE)
    assert generations.made is kept and len(kept) == 2


@pytest.mark.parametrize(
    ("batches", "shape"),
    [
        ([SECOND, FIRST], SHAPE),
        ([FIRST], SHAPE),
        ([FIRST, SECOND, FIRST], SHAPE),
        ([FIRST, batch("a cow", "a fox")], SHAPE),
        ([FIRST, SECOND], (4, *SHAPE[1:])),
        ([FIRST, SECOND], (*SHAPE[:2], 4, 4)),
    ],
    ids=["another order", "fewer", "more", "another prompt", "more latents per prompt", "another resolution"],
)
def test_latents_of_a_checkpoint_fit_nothing_else(batches, shape):
    generations = Generations()
    for one in (FIRST, SECOND):
        generations.add(one["caption"], torch.zeros(SHAPE))
    assert not generations.begin(batches, shape)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_spoiled_latents_are_named_with_step_and_remedy(value):
    latents = torch.zeros(SHAPE)
    assert not_finite(latents, 7) == ""
    latents[1, 2, 0, 1] = value
    said = not_finite(latents, 7)
    assert said.startswith("step 7: the generated latents are not finite") and "--learning_rate" in said
