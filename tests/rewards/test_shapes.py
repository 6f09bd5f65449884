"""The judge of the captioned-shapes world as a reward."""

import numpy as np
import pytest
import torch

from reward import load_reward
from sharpening.rewards.calling import RewardError
from tiny_world import shapes


def test_shapes():
    captions = shapes.training_captions()[:4]
    rng = np.random.default_rng(1)
    pictures = [shapes.draw(caption, rng) for caption in captions]
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255
    reward = load_reward("shapes")
    direct = shapes.score(np.stack([np.asarray(picture) for picture in pictures]) / 255, captions)
    np.testing.assert_allclose(reward.get_reward(images, captions).numpy(), direct, atol=1e-6)
    np.testing.assert_allclose(reward.get_reward(pictures, captions).numpy(), direct, atol=1e-6)
    with pytest.raises(RewardError, match=r"the reward shapes failed with ValueError.*a unicorn"):
        reward.get_reward(images, [*captions[:3], "a unicorn"])
