"""The study's data in small, and its plan."""

import pytest

from study.plan import make_plan
from study.settings import WRONG_CAPTIONS, Size
from tiny_world.make_shapes_dataset import write_dataset, write_prompts


@pytest.fixture(scope="module")
def decode():
    """What decoding costs, in forwards of a row."""
    return 0.62


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the flags of the runs name: a few images and the prompts."""
    folder = tmp_path_factory.mktemp("study")
    write_dataset(folder / "shapes", num_images=9)
    write_dataset(folder / "shapes_wrong", num_images=9, wrong_fraction=WRONG_CAPTIONS)
    write_prompts(folder / "prompts.txt", "training")
    write_prompts(folder / "held_out_prompts.txt", "held_out")
    return folder


@pytest.fixture(scope="module")
def plan(folder, decode):
    return make_plan(Size(), folder, decode)
