"""HPS v2 against open_clip's own calls and preprocessing."""

import pytest
import torch

from reward import load_reward
from sharpening.rewards.hpsv2 import HPSv2Reward
from tests.support.reward_inputs import PROMPTS, noise, to_pil
from tests.support.tiny_rewards import TINY, clip_scores


@pytest.mark.parametrize(("height", "width"), [(224, 224), (224, 100), (512, 512), (300, 460), (460, 300)])
def test_hpsv2_is_the_cosine_of_the_padded_image(height, width, tiny_clip):
    import open_clip

    weights, model, _ = tiny_clip
    preprocess = open_clip.image_transform(224, is_train=False, resize_mode="longest", interpolation="bicubic")
    images = noise(4, height, width)
    reward = HPSv2Reward(f"{TINY}={weights}")
    if max(height, width) == 224:  # nothing is resized, so nothing is rounded
        scores = reward.get_reward(images, PROMPTS)
        expected = clip_scores(model, preprocess, to_pil(images), PROMPTS) / 100
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
        assert scores.std() > 0.01
    ours = reward.clip.preprocess(images, "longest")
    published = torch.stack([preprocess(picture) for picture in to_pil(images)])
    assert (ours - published).abs().max() < 2.5 / 255 / 0.26


def test_hpsv2_reads_the_published_wrapping(tiny_clip, tmp_path):
    weights, *_ = tiny_clip
    torch.save({"epoch": 3, "state_dict": torch.load(weights)}, tmp_path / "HPS_v2.1_compressed.pt")
    images = noise(4, 224, 224)
    wrapped = load_reward(f"hpsv2:{TINY}={tmp_path}").get_reward(images, PROMPTS)
    torch.testing.assert_close(wrapped, load_reward(f"hpsv2:{TINY}={weights}").get_reward(images, PROMPTS))
