"""The study's data in small, and its plan."""

import pytest

from study.execution import PROMPT_FILES
from study.methods import METHODS
from study.plan import Planner, make_plan
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
    write_dataset(folder / "shapes_study", num_images=9, captions="study")
    for captions, name in PROMPT_FILES.items():
        write_prompts(folder / name, captions)
    return folder


@pytest.fixture(scope="module")
def planner(folder, decode):
    return Planner(Size(), folder, decode)


@pytest.fixture(scope="module")
def plan(planner):
    """The plan if nothing had been gained by tuning."""
    return make_plan(planner, {label: method.untuned() for label, method in METHODS.items()})
