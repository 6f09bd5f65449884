"""CLIP rewards against open_clip's own calls."""

import json

import pytest
import torch

from reward import load_reward
from sharpening.errors import UserError
from sharpening.rewards.clip import CLIPScoreReward
from sharpening.rewards.open_clip_model import parse_name
from tests.support.reward_inputs import PROMPTS, noise, to_pil
from tests.support.tiny_rewards import TINY, clip_scores


def test_clip_equals_open_clip(tiny_clip):
    weights, model, preprocess = tiny_clip
    images = noise(4, 224, 224)
    expected = clip_scores(model, preprocess, to_pil(images), PROMPTS)
    assert expected.std() > 1  # scores that are all alike would agree with anything
    reward = load_reward("clip", clip_model=f"{TINY}/{weights}")
    scores = reward.get_reward(images, PROMPTS)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(reward.get_reward(to_pil(images), PROMPTS), scores, atol=1e-4, rtol=0)
    alone = torch.cat([reward.get_reward(images[row : row + 1], PROMPTS[row]) for row in range(4)])
    torch.testing.assert_close(alone, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 460), (64, 32)])
def test_clip_resizes_and_crops_as_published(height, width, tiny_clip):
    weights, _, preprocess = tiny_clip
    images = noise(2, height, width)
    ours = CLIPScoreReward(f"{TINY}/{weights}").clip.preprocess(images)
    published = torch.stack([preprocess(picture) for picture in to_pil(images)])
    assert ours.shape == (2, 3, 224, 224)
    # PIL rounds to 1/255 after each of its two passes; a standard deviation is about 0.26.
    assert (ours - published).abs().max() < 2.5 / 255 / 0.26


def test_clip_resize_stays_in_range(tiny_clip):
    images = torch.zeros(1, 3, 100, 100)
    images[..., 50:] = 1.0
    reward = CLIPScoreReward(f"{TINY}/{tiny_clip[0]}")
    mean, std = (torch.tensor(reward.clip.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    restored = reward.clip.preprocess(images) * std + mean
    assert restored.min() > -1e-6 and restored.max() < 1 + 1e-6


def test_clip_cuts_at_77_tokens(tiny_clip):
    reward = load_reward("clip", clip_model=f"{TINY}/{tiny_clip[0]}")
    images = noise(1).expand(3, -1, -1, -1)
    fits = "cat " * 75  # and the two tokens for start and end
    scores = reward.get_reward(images, [fits, fits + "and a dog", "cat " * 74])
    assert scores[0] == scores[1] and scores[0] != scores[2]


def test_clip_ignores_autocast(tiny_clip):
    reward = load_reward("clip", clip_model=f"{TINY}/{tiny_clip[0]}")
    images = noise(4)
    plain = reward.get_reward(images, PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward.get_reward(images, PROMPTS), plain)


def uses_quick_gelu(reward):
    (activation,) = {type(block.mlp.gelu).__name__ for block in reward.clip.model.visual.transformer.resblocks}
    return activation == "QuickGELU"


def test_clip_activation_follows_the_weights(tiny_clip, monkeypatch, recwarn):
    """OpenAI's weights need QuickGELU; open_clip builds `ViT-L-14` with GELU and only warns."""
    import open_clip

    assert open_clip.get_pretrained_cfg("ViT-L-14", "openai")["quick_gelu"]
    weights = str(tiny_clip[0])
    tags = {"openai": {"file": weights, "quick_gelu": True}, "laion": {"file": weights}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, tags)
    assert uses_quick_gelu(CLIPScoreReward(f"{TINY}/openai"))
    assert uses_quick_gelu(CLIPScoreReward(TINY))  # a name alone means its openai weights
    assert not uses_quick_gelu(CLIPScoreReward(f"{TINY}/laion"))
    assert uses_quick_gelu(CLIPScoreReward(f"{TINY}-quickgelu/{weights}"))
    assert not uses_quick_gelu(CLIPScoreReward(f"{TINY}/{weights}"))
    assert not [warning for warning in recwarn if "QuickGELU" in str(warning.message)]


def test_clip_from_a_local_folder(tiny_clip, tmp_path):
    weights, model, preprocess = tiny_clip
    config = {"model_cfg": json.loads((weights.parent / f"{TINY}.json").read_text()), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(weights.read_bytes())
    images = noise(4, 224, 224)
    scores = load_reward("clip", clip_model=f"local-dir:{tmp_path}").get_reward(images, PROMPTS)
    torch.testing.assert_close(scores, clip_scores(model, preprocess, to_pil(images), PROMPTS), atol=1e-4, rtol=0)


def test_clip_with_a_model_named_in_the_spec(tiny_clip):
    weights, model, preprocess = tiny_clip
    images = noise(4, 224, 224)
    expected = clip_scores(model, preprocess, to_pil(images), PROMPTS)
    total, components = load_reward(f"clip:{TINY}/{weights}:0.5", clip_model="ViT-L-14/openai").score(images, PROMPTS)
    torch.testing.assert_close(components["clip"], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(total, expected / 2, atol=1e-4, rtol=0)
    twice = load_reward(f"clip:{TINY}/{weights},clip:{TINY}-quickgelu/{weights}").get_components(images, PROMPTS)
    assert [name.partition("/")[0].split("-tmp")[0] for name in twice] == [f"clip:{TINY}-", f"clip:{TINY}-quickgelu-"]


def test_model_without_weights_means_those_that_open_clip_lists_first():
    assert parse_name("--clip_model", "ViT-L-14") == ("ViT-L-14", "openai")
    assert parse_name("--clip_model", "ViT-H-14") == ("ViT-H-14", "laion2b_s32b_b79k")


@pytest.mark.parametrize(
    ("clip_model", "said"),
    [
        ("ViT-L14/openai", "did you mean ViT-L-14?"),
        ("./weights.pt", "write NAME/WEIGHTS"),
        ("ViT-H-14/openai", "openai is neither an existing file nor the name of weights for ViT-H-14; open_clip has"),
        ("ViT-L-14/nowhere/weights.pt", "nowhere/weights.pt is neither"),
        ("ViT-B-32/{weights}", "must be an open_clip state dict of ViT-B-32"),
        (TINY + "/{junk}", "must be an open_clip state dict"),
        ("local-dir:/nowhere", "--clip_model local-dir:/nowhere could not be loaded"),
        ("local-dir:{empty}", "could not be loaded"),
    ],
)
def test_bad_clip_model(clip_model, said, tiny_clip, tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError) as caught:
        load_reward(
            "clip", clip_model=clip_model.format(weights=tiny_clip[0], junk=tmp_path / "junk.pt", empty=tmp_path)
        )
    message = str(caught.value)
    assert "--clip_model" in message and said in message and "\n" not in message


def test_clip_weights_that_cannot_be_downloaded(monkeypatch):
    import open_clip

    asked = {}

    def offline(*args, **kwargs):
        asked.update(kwargs)
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(UserError) as caught:
        load_reward("clip", cache_dir="elsewhere")
    assert asked == {"cache_dir": "elsewhere"}
    message = str(caught.value)
    assert "--clip_model ViT-L-14/openai" in message
    assert "Name or service not known" in message and "give their path" in message and "\n" not in message


# --------------------------------------------------------------------------------------------------- clip_non_spatial


def test_clip_non_spatial_is_the_cosine_of_clip(tiny_clip):
    weights, *_ = tiny_clip
    images = noise(4)
    named = f"{TINY}/{weights}"
    scores = load_reward(f"clip_non_spatial:{named}").get_reward(images, PROMPTS)
    torch.testing.assert_close(100 * scores, load_reward(f"clip:{named}").get_reward(images, PROMPTS))
    assert scores.abs().max() <= 1 and scores.std() > 0.01


def test_clip_non_spatial_is_openai_s_base_model_by_default(monkeypatch):
    import open_clip

    asked = []

    def offline(config, *args, **kwargs):
        asked.append(config)
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(UserError, match="--reward_model clip_non_spatial:ViT-B-32/openai could not be loaded"):
        load_reward("clip_non_spatial")
    assert asked == [open_clip.get_pretrained_cfg("ViT-B-32", "openai")]
