"""A file of a user's own rewards."""

import pytest

# Five lines, as `reward.py` shows them; then what else a user may bring.
MY_REWARD = """
def redness(images, prompts):
    red, green, blue = images.unbind(dim=1)
    return (red - (green + blue) / 2).mean(dim=(1, 2))

class Length:
    def __init__(self, device="unset"):
        self.device = device

    def get_reward(self, images, prompts):
        import torch
        return torch.tensor([len(prompt) for prompt in prompts])

class Plain:
    def get_reward(self, images, prompts):
        return images.mean(dim=(1, 2, 3))

class Placed:
    def __init__(self, device):
        self.device = device

    def get_reward(self, images, prompts):
        return images.new_full((len(images),), float(self.device == "meta"))

class NeedsMore:
    def __init__(self, temperature):
        pass

class NoMethod:
    pass

ready = Length(device="made by the file")
number = 3
"""


@pytest.fixture
def my_reward(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(MY_REWARD)
    return path
