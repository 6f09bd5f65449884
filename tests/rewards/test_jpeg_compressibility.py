"""Compressibility against the size of files that PIL writes."""

import pytest
import torch

from reward import load_reward
from tests.support.reward_inputs import noise, to_pil


def test_jpeg_compressibility(tmp_path):
    images = torch.cat([noise(2, 64, 80), torch.rand(1, 3, 64, 80).mul(255).round() / 255, torch.ones(1, 3, 64, 80)])
    scores = load_reward("jpeg_compressibility").get_reward(images, ["x"] * 4)
    for score, image in zip(scores, to_pil(images), strict=True):
        image.save(tmp_path / "image.jpg", quality=95)
        assert score.item() == pytest.approx(-(tmp_path / "image.jpg").stat().st_size / 1000)
    assert scores[2] < scores[0] < scores[3] < 0  # noise compresses worst, a blank best
    assert torch.equal(load_reward("jpeg_compressibility").get_reward(to_pil(images), ["x"] * 4), scores)
