"""PickScore against transformers' own call."""

import shutil

import pytest
import torch

from reward import load_reward
from sharpening.errors import UserError
from tests.support.reward_inputs import PROMPTS, noise, to_pil


def test_pickscore_is_the_published_formula(tiny_pickscore):
    from transformers import AutoModel, AutoProcessor

    images = noise(4, 224, 224)
    model, processor = AutoModel.from_pretrained(tiny_pickscore), AutoProcessor.from_pretrained(tiny_pickscore)
    expected = []
    for picture, prompt in zip(to_pil(images), PROMPTS, strict=True):
        inputs = processor(
            images=picture, text=prompt, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.no_grad():
            expected.append(model(**inputs).logits_per_image.item())
    reward = load_reward(f"pickscore:{tiny_pickscore}")
    scores = reward.get_reward(images, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=0)
    assert scores.std() > 0.1
    alone = torch.cat([reward.get_reward(images[row : row + 1], PROMPTS[row]) for row in range(4)])
    torch.testing.assert_close(alone, scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(reward.get_reward(to_pil(images), PROMPTS), scores, atol=1e-4, rtol=0)


def test_pickscore_without_its_tokenizer_is_refused(tiny_pickscore, tmp_path):
    """transformers would tokenize every prompt alike."""
    shutil.copytree(tiny_pickscore, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="its tokenizer has no vocabulary"):
        load_reward(f"pickscore:{tmp_path}/model")
