"""Rewards of a user's own: functions, classes and objects of files and modules."""

import importlib

import pytest
import torch

from reward import load_reward
from sharpening.errors import UserError
from sharpening.rewards.spec import Component


def test_user_function_class_and_object(my_reward):
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0] = 1.0
    images[1, 2] = 1.0
    prompts = ["a", "four"]
    assert load_reward(f"{my_reward}:redness").get_reward(images, prompts).tolist() == [1.0, -0.5]
    total = load_reward(f"{my_reward}:Length").get_reward(images, prompts)  # integers become float32
    assert total.dtype == torch.float32 and total.device.type == "cpu" and total.tolist() == [1.0, 4.0]
    assert load_reward(f"{my_reward}:ready").get_reward(images, prompts).tolist() == [1.0, 4.0]
    torch.testing.assert_close(load_reward(f"{my_reward}:Plain").get_reward(images, prompts), torch.full((2,), 1 / 3))


def test_user_class_gets_the_device_it_asks_for(my_reward):
    for device, score in (("meta", 1.0), ("cpu", 0.0)):
        reward = load_reward(f"{my_reward}:Placed", device=device)
        assert reward.get_reward(torch.zeros(1, 3, 8, 8), ["a"]).tolist() == [score]


def test_user_module(my_reward, monkeypatch):
    package = my_reward.parent / "my_rewards_package"
    package.mkdir()
    (package / "__init__.py").touch()
    my_reward.rename(package / "colours.py")
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    reward = load_reward("my_rewards_package.colours:redness:2")
    assert reward.get_reward(torch.ones(1, 3, 4, 4), ["x"]).tolist() == [0.0]
    assert reward.components == [Component("redness", 2.0, "my_rewards_package.colours:redness")]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{file}:rednes", "holds no rednes (did you mean redness?)"),
        ("{file}:number", "neither a function nor has it a method get_reward"),
        ("{file}:NoMethod", "neither a function nor has it a method get_reward"),
        ("{file}:NeedsMore", "temperature"),
        ("{broken}:redness", "SyntaxError"),
        ("{lacking}:redness", "No module named 'no_such_module'"),
        ("json.no_such_submodule:redness", "No module named 'json.no_such_submodule'"),
        ("json:no_such_name", "holds no no_such_name"),
    ],
)
def test_bad_user_reward_is_one_sentence_naming_the_flag(spec, said, my_reward):
    broken, lacking = my_reward.with_name("broken.py"), my_reward.with_name("lacking.py")
    broken.write_text("def redness(:\n")
    lacking.write_text("import no_such_module\n")
    with pytest.raises(UserError) as caught:
        load_reward(spec.format(file=my_reward, broken=broken, lacking=lacking))
    message = str(caught.value)
    assert message.startswith("--reward_model") and said in message and "\n" not in message
