"""Compositional rewards against the ImageReward models that they sum."""

import pytest
import torch
from PIL import Image

from reward import load_reward
from sharpening.errors import UserError
from sharpening.rewards.compositional import parse_compositional
from tests.support.image_reward_weights import PROMPTS, seeded_images
from tests.support.tiny_rewards import write_image_reward

IMAGES = [Image.fromarray(image) for image in seeded_images(4)]


@pytest.fixture(scope="module")
def three_models(tmp_path_factory):
    root = tmp_path_factory.mktemp("compositional")
    return {
        name: write_image_reward(root / name, variant)
        for variant, name in enumerate(("attribute", "spatial", "non_spatial"))
    }


def test_compositional_is_the_weighted_sum_of_its_models_each_reported_apart(three_models):
    images, prompts = IMAGES[:4], list(PROMPTS[:4])
    models = ",".join(f"{name}={path}" for name, path in three_models.items())
    total, values = load_reward(
        "compositional:2", compositional_models=models, compositional_weights="1,0.5,-3"
    ).score(images, prompts)
    apart = {
        name: load_reward(f"image_reward:{path}").get_reward(images, prompts) for name, path in three_models.items()
    }
    for name, scores in apart.items():
        torch.testing.assert_close(values[f"compositional/{name}"], scores, atol=1e-4, rtol=0)
    expected = apart["attribute"] + 0.5 * apart["spatial"] - 3 * apart["non_spatial"]
    torch.testing.assert_close(values["compositional"], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(total, 2 * expected, atol=1e-3, rtol=0)
    assert (apart["attribute"] - apart["spatial"]).abs().min() > 1e-3
    unweighted = load_reward("compositional", compositional_models=models).get_reward(images, prompts)
    torch.testing.assert_close(unweighted, sum(apart.values()), atol=1e-3, rtol=0)


def test_one_compositional_model_alone(three_models):
    path = three_models["spatial"]
    expected = load_reward(f"image_reward:{path}").get_reward(IMAGES[:2], list(PROMPTS[:2]))
    for load in (
        lambda: load_reward(f"compositional:{path}"),
        lambda: load_reward("compositional", compositional_models=str(path)),
        lambda: load_reward("compositional", compositional_models=f"spatial={path}"),
    ):
        total, values = load().score(IMAGES[:2], list(PROMPTS[:2]))
        torch.testing.assert_close(total, expected, atol=1e-4, rtol=0)
        assert list(values) == ["compositional"]


@pytest.mark.parametrize(
    ("models", "weights", "said"),
    [
        (None, None, "name your checkpoints with --compositional_models attribute=PATH"),
        ("a.pt,b.pt", None, "must be distinct names with paths"),
        ("a=x.pt,a=y.pt", None, "must be distinct names with paths"),
        ("a=,b=y.pt", None, "must be distinct names with paths"),
        ("a=x.pt,b=y.pt", "1", "--compositional_weights 1 must be 2 numbers"),
        ("a=x.pt,b=y.pt", "1,much", "--compositional_weights 1,much must be 2 numbers"),
        ("a=./x.pt,b=./y.pt", None, "--compositional_models a: there is no file ./x.pt"),
    ],
)
def test_compositional_flags_that_cannot_work(models, weights, said):
    with pytest.raises(UserError) as caught:
        load_reward("compositional", compositional_models=models, compositional_weights=weights)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_path_may_hold_an_equals_sign():
    assert parse_compositional("a=/x/lr=1e-5/m.pt,b=y.pt", "1,2") == (
        [1.0, 2.0],
        {"a": "/x/lr=1e-5/m.pt", "b": "y.pt"},
    )
    assert parse_compositional("/x/lr=1e-5/m.pt", None) == ([1.0], {"": "/x/lr=1e-5/m.pt"})
    with pytest.raises(UserError, match="--compositional_weights nan"):
        parse_compositional("a=x,b=y", "nan,1")
