"""The aesthetic predictor against its layers one by one."""

import pytest
import torch

from reward import load_reward
from sharpening.errors import UserError
from tests.support.reward_inputs import noise, to_pil
from tests.support.tiny_rewards import TINY


def test_aesthetic_is_the_published_stack_of_layers_on_the_unit_embedding(tiny_clip, aesthetic_head):
    weights, model, preprocess = tiny_clip
    images = noise(3, 224, 224)
    with torch.no_grad():
        features = torch.cat([model.encode_image(preprocess(picture)[None]) for picture in to_pil(images)])
    value = features / features.norm(dim=-1, keepdim=True)
    head = torch.load(aesthetic_head)
    for index in (0, 2, 4, 6, 7):
        value = value @ head[f"layers.{index}.weight"].T + head[f"layers.{index}.bias"]
    for name in (aesthetic_head, aesthetic_head.parent):
        reward = load_reward(f"aesthetic:{name}", aesthetic_clip=f"{TINY}/{weights}")
        scores = reward.get_reward(images, ["x", "y", "z"])
        torch.testing.assert_close(scores, value[:, 0], atol=1e-4, rtol=1e-4)
    assert scores.std() > 0.01
    torch.testing.assert_close(reward.get_reward(images, ["other", "", "z"]), scores)  # the prompt plays no part


def test_aesthetic_refuses_another_file(tiny_clip, tmp_path):
    torch.save({"layers.0.weight": torch.ones(1, 32)}, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"aesthetic:.*part\.pth is not that predictor"):
        load_reward(f"aesthetic:{tmp_path}/part.pth", aesthetic_clip=f"{TINY}/{tiny_clip[0]}")
