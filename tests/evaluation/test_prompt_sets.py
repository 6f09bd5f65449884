"""Prompts of a file, or of a published set."""

import datasets
import pytest

from sharpening.errors import UserError
from sharpening.evaluation.prompt_sets import NAMES, PUBLISHED, load_prompt_set


def test_prompt_sets(tmp_path):
    assert len(load_prompt_set("shapes")) == 9
    assert set(NAMES) == {"shapes", *PUBLISHED} and "t2i-compbench:non_spatial" in NAMES
    for name, said in (("drawbenc", "did you mean drawbench"), (str(tmp_path / "no.txt"), "neither a file nor a set")):
        with pytest.raises(UserError, match=said):
            load_prompt_set(name)


@pytest.mark.parametrize("name", ["drawbench", "t2i-compbench:color"])
def test_set_out_of_reach_is_one_sentence(name, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=f"--prompts {name} could not be downloaded .*no route"):
        load_prompt_set(name, cache_dir=str(tmp_path))


def test_published_set_is_read_from_its_column(monkeypatch):
    asked = []
    rows = {"Prompts": ["a cat", "", "a  dog\n", "a cat"]}
    monkeypatch.setattr(datasets, "load_dataset", lambda **source: asked.append(source) or rows)
    assert load_prompt_set("drawbench") == ["a cat", "a dog"]
    assert asked[0]["path"] == "sayakpaul/drawbench"
