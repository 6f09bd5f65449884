"""The catalogue, its flags, and how they reach its entries."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reward import CATALOGUE, REWARD_FLAGS, check_reward_flags, load_reward, reward_options
from sharpening.errors import UserError
from sharpening.flags import parse

ROOT = Path(__file__).resolve().parents[2]


def test_every_entry_is_documented():
    for name, entry in CATALOGUE.items():
        assert "Range: " in entry.__doc__, name


def test_flags_reach_the_entry_whose_name_they_begin_with(monkeypatch):
    seen = {}

    class Entry:
        def __init__(self, model="default", colour="red", cache_dir=None, base_url=None):
            seen.update(model=model, colour=colour, cache_dir=cache_dir, base_url=base_url)

        def get_reward(self, images, prompts):
            return torch.zeros(len(prompts))

    monkeypatch.setitem(CATALOGUE, "entry", Entry)
    load_reward("entry", entry_colour="blue", clip_model="x", cache_dir="here", base_url=None)
    assert seen == {"model": "default", "colour": "blue", "cache_dir": "here", "base_url": None}
    load_reward("entry:a/b:0.5", entry_model="loses")
    assert seen["model"] == "a/b"
    with pytest.raises(TypeError, match="entry_size"):
        load_reward("entry", entry_size=3)


def test_spec_is_parsed_without_heavy_imports(my_reward):
    program = f"""
import sys
import reward
reward.parse_reward_spec("clip:0.1,shapes,{my_reward}:redness,torch.nn:Module")
heavy = {{"torch", "open_clip", "torchvision", "transformers", "numpy", "PIL", "pandas", "pydantic", "openai"}}
heavy &= set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def values(*argv):
    return {"cache_dir": None, **vars(parse("", {"reward": REWARD_FLAGS}, argv))}


def test_flag_that_is_not_given_has_one_default_on_every_way_to_an_entry(monkeypatch):
    """From a command line, left out of a call, and None in a call."""
    seen = []

    class Entry:
        def __init__(
            self,
            model,
            template,
            score,
            concurrency,
            timeout,
            max_retries,
            max_calls=None,
            base_url=None,
            api_key=None,
        ):
            seen.append((model, template, score, concurrency, timeout, max_retries, max_calls, base_url, api_key))

        def get_reward(self, images, prompts):
            return torch.zeros(len(prompts))

    monkeypatch.setitem(CATALOGUE, "mllm", Entry)
    load_reward("mllm", **reward_options(values()))
    load_reward("mllm")
    load_reward("mllm", mllm_model=None, mllm_timeout=None, api_key=None)
    assert seen == [("gpt-4o", "five_aspects", "overall", 8, 60.0, 3, None, None, None)] * 3
    load_reward("mllm", **reward_options(values("--mllm_timeout=2", "--mllm_max_calls=7", "--api_key=secret")))
    assert seen[-1] == ("gpt-4o", "five_aspects", "overall", 8, 2.0, 3, 7, None, "secret")


def test_options_are_all_flags_but_the_spec():
    options = reward_options(values("--reward_failure=skip", "--clip_model=x") | {"cache_dir": "here"})
    named = {flag.name for flag in REWARD_FLAGS} - {"reward_model", "reward_failure", "reward_dtype"}
    assert options.keys() == named | {"failure", "dtype", "cache_dir"}
    assert (options["failure"], options["clip_model"], options["cache_dir"]) == ("skip", "x", "here")
    assert load_reward("shapes", **options).failure == "skip"


def test_only_the_key_is_secret_and_only_what_changes_no_score_may_change_in_a_resumed_run():
    assert [flag.name for flag in REWARD_FLAGS if flag.secret] == ["api_key"]
    free = {flag.name for flag in REWARD_FLAGS if flag.free}
    assert free == {"mllm_concurrency", "mllm_timeout", "mllm_max_retries", "mllm_max_calls"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--mllm_concurrency=0"], "--mllm_concurrency is 0, but it must be at least 1"),
        (["--mllm_max_calls=0"], "--mllm_max_calls is 0, but it must be at least 1"),
        (["--mllm_max_retries=-1"], "--mllm_max_retries is -1, but it must not be negative"),
        (["--mllm_timeout=0"], "--mllm_timeout is 0.0, but it must be above 0"),
        (["--mllm_score=best"], "--mllm_score"),
        (["--reward_failure=pass"], "--reward_failure"),
        (["--reward_model=clop"], "did you mean clip?"),
        (["--reward_model=mllm", "--mllm_template=nice"], "--mllm_template nice"),
        (
            ["--reward_model=mllm", "--mllm_template=final_score", "--mllm_score=mean"],
            "--mllm_score mean needs aspects",
        ),
        (["--reward_model=shapes,compositional", "--compositional_weights=1,2"], "3 numbers"),
        (["--reward_model=compositional", "--compositional_models=a=x,b=y", "--compositional_weights=1"], "2 numbers"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_anything_is_loaded(argv, said):
    with pytest.raises(UserError) as caught:
        check_reward_flags(values(*argv))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_flags_that_can_work_pass():
    check_reward_flags(values())
    check_reward_flags(values("--reward_model=mllm:x,compositional:a.pt", "--mllm_template=prompt_alignment"))
    check_reward_flags(values("--reward_model=compositional", "--compositional_weights=1,0.5,2"))


def test_cap_on_calls_is_shared_by_the_processes_of_a_run_and_then_by_its_graders(monkeypatch):
    caps = []

    class Entry:
        def __init__(self, model, max_calls=None):
            caps.append(max_calls)

        def get_reward(self, images, prompts):
            return torch.zeros(len(prompts))

    monkeypatch.setitem(CATALOGUE, "mllm", Entry)
    load_reward("mllm", mllm_max_calls=11, processes=3)
    load_reward("mllm:a,mllm:b", mllm_max_calls=11, processes=2)
    load_reward("mllm", mllm_max_calls=None, processes=2)
    assert caps == [3, 2, 2, None]
    with pytest.raises(UserError, match=r"^--mllm_max_calls is 2, but 3 processes share it; raise it$"):
        load_reward("mllm", mllm_max_calls=2, processes=3)
