"""The grammar of `--reward_model`."""

import pytest

from reward import load_reward, parse_reward_spec
from sharpening.errors import UserError
from sharpening.rewards.spec import Component


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("clip", [("clip", 1.0, "clip")]),
        (" shapes ", [("shapes", 1.0, "shapes")]),
        ("clip:0.01", [("clip", 0.01, "clip")]),
        ("clip:-2", [("clip", -2.0, "clip")]),
        ("clip:ViT-H-14", [("clip", 1.0, "clip", "ViT-H-14")]),
        ("clip:ViT-H-14/laion2b_s32b_b79k:0.5", [("clip", 0.5, "clip", "ViT-H-14/laion2b_s32b_b79k")]),
        ("clip:hf-hub:owner/name:-1", [("clip", -1.0, "clip", "hf-hub:owner/name")]),
        ("image_reward:some/where/it.pt", [("image_reward", 1.0, "image_reward", "some/where/it.pt")]),
        ("mllm:gpt-4o-mini:2,clip", [("mllm", 2.0, "mllm", "gpt-4o-mini"), ("clip", 1.0, "clip")]),
        ("clip:ViT-L-14,clip:ViT-H-14/x:2", [
            ("clip:ViT-L-14", 1.0, "clip", "ViT-L-14"), ("clip:ViT-H-14-x", 2.0, "clip", "ViT-H-14/x"),
        ]),
        ("clip : 1e-3 , shapes", [("clip", 1e-3, "clip"), ("shapes", 1.0, "shapes")]),
        ("{file}:redness", [("redness", 1.0, "{file}:redness")]),
        ("{file}:redness:0.5", [("redness", 0.5, "{file}:redness")]),
        ("{file}:inf", [("inf", 1.0, "{file}:inf")]),  # after a path the first part is always a name
        ("{file}:redness:2,jpeg_compressibility:0.1,{file}:Length", [
            ("redness", 2.0, "{file}:redness"),
            ("jpeg_compressibility", 0.1, "jpeg_compressibility"),
            ("Length", 1.0, "{file}:Length"),
        ]),
        ("tiny_world.shapes:score:3", [("score", 3.0, "tiny_world.shapes:score")]),
        ("json:loads", [("loads", 1.0, "json:loads")]),
    ],
)  # fmt: skip
def test_spec(spec, expected, my_reward):
    file = str(my_reward)
    parsed = parse_reward_spec(spec.format(file=file))
    assert parsed == [
        Component(name, weight, target.format(file=file), *model) for name, weight, target, *model in expected
    ]


def test_spec_with_relative_path_and_home(my_reward, monkeypatch):
    monkeypatch.chdir(my_reward.parent)
    monkeypatch.setenv("HOME", str(my_reward.parent))
    for spec in ("my_reward.py:redness", "./my_reward.py:redness", "~/my_reward.py:redness"):
        load_reward(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("clip,", "comma"),
        (",clip", "comma"),
        ("clip,,shapes", "comma"),
        ("clop", "did you mean clip?"),
        ("CLIP", "did you mean clip?"),
        ("jpeg", "jpeg_compressibility, shapes, or your own"),
        ("clip=0.5", "unknown"),
        ("0.5", "unknown"),
        ("0.5:clip", "unknown"),
        (":clip", "unknown"),
        ("clip:0", "weight 0"),
        ("clip:-0.0", "weight -0.0"),
        ("clip:nan", "weight nan"),
        ("clip:inf", "weight inf"),
        ("clip:-Infinity", "weight -Infinity"),
        ("clip:", "nothing is not a number"),
        ("clip::1", ":1 is not a number"),
        ("shapes:half", "half is not a number"),
        ("shapes:1:2", "1:2 is not a number"),
        ("clip,clip", "names clip 2 times"),
        ("clip:ViT-H-14,clip:ViT-H-14:2", "names clip:ViT-H-14 2 times"),
        ("clip:1,shapes,clip:2", "names clip 2 times"),
        ("{file}:redness,{file}:redness:2", "names redness 2 times"),
        ("{file}", "which function or class"),
        ("{file}:", "which function or class"),
        ("{file}:0.5", "which function or class"),
        ("{file}:redness:", "nothing is not a number"),
        ("{file}:redness:x", "x is not a number"),
        ("{file}:redness:0", "weight 0"),
        ("{file}:redness:1:2", "1:2 is not a number"),
        ("./nowhere.py:redness", "there is no file ./nowhere.py"),
        ("nowhere.py:redness", "there is no file nowhere.py"),
        ("{folder}:redness", "there is no file"),
        ("no_such_package.rewards:Redness", "finds no module no_such_package.rewards"),
        ("clop:redness", "did you mean clip?"),
        ("my-module:redness", "unknown"),
        ("folder/without_a_name", "which function or class"),
        ("tiny_world.shapes", "which function or class"),
    ],
)
def test_bad_spec_is_one_sentence_naming_the_flag(spec, said, my_reward):
    with pytest.raises(UserError) as caught:
        parse_reward_spec(spec.format(file=my_reward, folder=my_reward.parent))
    message = str(caught.value)
    assert message.startswith("--reward_model") and said in message and "\n" not in message
