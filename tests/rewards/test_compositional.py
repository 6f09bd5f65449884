"""Compositional rewards against the ImageReward models that they sum, and where their checkpoints are found."""

import shutil

import pytest
import torch
from PIL import Image

from reward import load_reward
from sharpening.errors import UserError
from sharpening.rewards.compositional import parse_compositional
from tests.support.hub_server import HubServer
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


SPELLINGS = [
    ("attribute_binding.pt", "spatial.pt", "non_spatial.pt"),
    ("Attribute-Binding.pth", "Spatial Relationship.pth", "Non-Spatial Relationship.pth"),
    ("reward_attr.bin", "reward_spatial.bin", "reward_nonspatial.bin"),
    ("binding/best_lr=1e-05.pt", "spatial/best_lr=1e-05.pt", "NonSpatial/best_lr=1e-05.pt"),
]


def write_folder(folder, names, three_models):
    for name, checkpoint in zip(names, three_models.values(), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint, folder / name)
        shutil.copy(checkpoint.with_name("vocab.txt"), (folder / name).with_name("vocab.txt"))


def scores_of_three(three_models):
    images, prompts = IMAGES[:2], list(PROMPTS[:2])
    rewards = [load_reward(f"image_reward:{path}") for path in three_models.values()]
    return images, prompts, [reward.get_reward(images, prompts) for reward in rewards]


@pytest.mark.parametrize("names", SPELLINGS)
def test_models_of_a_folder_are_told_apart_by_their_names(names, three_models, tmp_path):
    write_folder(tmp_path / "copy", names, three_models)
    (tmp_path / "copy" / "README.md").write_text("attribute")
    (tmp_path / "copy" / "other.pt").write_bytes(b"says nothing")
    images, prompts, expected = scores_of_three(three_models)
    for load in (
        lambda: load_reward(f"compositional:{tmp_path}/copy", compositional_weights="1,2,4"),
        lambda: load_reward("compositional", compositional_models=f"{tmp_path}/copy", compositional_weights="1,2,4"),
    ):
        total, values = load().score(images, prompts)
        for name, scores in zip(("attribute", "spatial", "non_spatial"), expected, strict=True):
            torch.testing.assert_close(values[f"compositional/{name}"], scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(total, expected[0] + 2 * expected[1] + 4 * expected[2], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["spatial.pt", "non_spatial.pt"],
        ["a.pt", "b.pt", "c.pt"],
        ["attribute.pt", "spatial.pt", "non_spatial.pt", "attribute_old.pt"],
        ["attribute_spatial.pt", "spatial.pt", "non_spatial.pt"],
    ],
)
def test_models_that_cannot_be_told_apart_are_listed_in_one_sentence(names, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError) as caught:
        load_reward(f"compositional:{tmp_path}")
    message = str(caught.value)
    assert f"({', '.join(sorted(names)) or 'there is none'})" in message and "\n" not in message
    assert message.startswith("--reward_model compositional: ")
    assert "--compositional_models attribute=PATH,spatial=PATH,non_spatial=PATH" in message


@pytest.fixture
def hub(three_models, tmp_path, monkeypatch):
    """A hub with a `comin/IterComp` as published, a pipeline beside the folder of rewards, and BERT's vocabulary."""
    names = ("attribute_binding.pt", "spatial.pt", "non_spatial.pt")
    write_folder(tmp_path / "hub" / "reward_models", names, three_models)
    (tmp_path / "hub" / "unet").mkdir()
    (tmp_path / "hub" / "unet" / "spatial.safetensors").touch()
    (tmp_path / "bert").mkdir()
    (tmp_path / "hub" / "reward_models" / "vocab.txt").rename(tmp_path / "bert" / "vocab.txt")
    repositories = {"comin/IterComp": tmp_path / "hub", "google-bert/bert-base-uncased": tmp_path / "bert"}
    with HubServer(repositories) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)  # what HF_ENDPOINT is read into
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield server


def test_published_models_are_found_on_the_hub_and_then_without_it(hub, three_models, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    images, prompts, expected = scores_of_three(three_models)
    total, values = load_reward("compositional", cache_dir=cache).score(images, prompts)
    assert list(values) == ["compositional", *(f"compositional/{name}" for name in three_models)]
    for name, scores in zip(three_models, expected, strict=True):
        torch.testing.assert_close(values[f"compositional/{name}"], scores, atol=1e-4, rtol=0)
    assert sorted(hub.downloaded) == [
        "reward_models/attribute_binding.pt", "reward_models/non_spatial.pt", "reward_models/spatial.pt", "vocab.txt",
    ]  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.testing.assert_close(load_reward("compositional", cache_dir=cache).get_reward(images, prompts), total)


def test_models_of_a_hub_that_cannot_be_told_apart(hub, tmp_path):
    (tmp_path / "hub" / "reward_models" / "spatial_2.pt").touch()
    with pytest.raises(UserError) as caught:
        load_reward("compositional", cache_dir=str(tmp_path / "cache"))
    assert "in comin/IterComp/reward_models (attribute_binding.pt, non_spatial.pt, spatial.pt, spatial_2.pt)" in str(
        caught.value
    )
    assert not hub.downloaded


@pytest.mark.parametrize(
    ("models", "weights", "said"),
    [
        (None, "1,2", "--compositional_weights 1,2 must be 3 numbers, one for each of comin/IterComp/reward_models"),
        ("a.pt,b.pt", None, "must be distinct names with paths"),
        ("a=x.pt,a=y.pt", None, "must be distinct names with paths"),
        ("a=,b=y.pt", None, "must be distinct names with paths"),
        ("a=x.pt,b=y.pt", "1", "--compositional_weights 1 must be 2 numbers"),
        ("a=x.pt,b=y.pt", "1,much", "--compositional_weights 1,much must be 2 numbers"),
        ("a=./x.pt,b=./y.pt", None, "--compositional_models a: there is no file ./x.pt"),
        ("./x.pt", None, "--compositional_models ./x.pt: there is no file ./x.pt"),
        ("./nowhere", None, "--compositional_models ./nowhere: there is no folder ./nowhere"),
        ("nowhere", None, "--compositional_models nowhere: there is no folder nowhere"),
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
