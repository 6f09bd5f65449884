"""ImageReward against the real `image-reward` package, by its golden values.

`make_image_reward_golden.py` recorded them: that package, in an environment of its own, on seeded random weights.
"""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from reward import load_reward
from sharpening.errors import UserError
from sharpening.rewards.image_reward_network import MAX_TOKENS, ImageRewardNetwork, ImageRewardScorer
from sharpening.rewards.preprocessing import CLIP_MEAN, CLIP_STD, preprocess
from tests.support.image_reward_weights import PROMPTS, seeded_images, write_vocab
from tests.support.tiny_rewards import golden_image_reward, image_reward_weights, write_image_reward

IMAGES = [Image.fromarray(image) for image in seeded_images(16)]


def published_pixels(images):
    """What the package does to PIL images."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(224, bicubic), transforms.CenterCrop(224), transforms.ToTensor()]
    pipeline = transforms.Compose([*steps, transforms.Normalize(CLIP_MEAN, CLIP_STD)])
    return torch.stack([pipeline(image) for image in images])


@pytest.fixture(scope="module")
def scorer(tiny_image_reward):
    return ImageRewardScorer("--reward_model image_reward", str(tiny_image_reward), "cpu", None, None)


@pytest.fixture(scope="module")
def golden():
    return golden_image_reward()


def test_tokens_are_the_packages(scorer, golden):
    ours = scorer.tokenizer(list(PROMPTS), padding="max_length", truncation=True, max_length=MAX_TOKENS)
    assert ours["input_ids"] == golden["tiny"]["input_ids"]
    assert ours["attention_mask"] == golden["tiny"]["attention_mask"]
    spelled = golden["tiny"]["spelled_specials"]
    ours = scorer.tokenizer(spelled["prompt"], padding="max_length", truncation=True, max_length=MAX_TOKENS)
    assert ours["input_ids"] == spelled["input_ids"]


def test_published_pixels_are_the_packages(golden):
    ours = [[float(image.mean()), float(image.std())] for image in published_pixels(IMAGES)]
    np.testing.assert_allclose(ours, golden["tiny"]["pixel_mean_and_std"], atol=1e-5)


def score_pixels(network, tokenizer, pixels, prompts, batch_size=16):
    scores = []
    for start in range(0, len(prompts), batch_size):
        tokens = tokenizer(
            prompts[start : start + batch_size], padding=True, truncation=True, max_length=35, return_tensors="pt"
        )
        with torch.no_grad():
            scores.append(network(pixels[start : start + batch_size], tokens.input_ids, tokens.attention_mask))
    return torch.cat(scores)


def test_scores_are_the_packages(scorer, golden):
    pixels, expected = published_pixels(IMAGES), golden["tiny"]

    def check(pixels, prompts, values):
        scores = score_pixels(scorer.network, scorer.tokenizer, pixels, prompts)
        torch.testing.assert_close(scores, torch.tensor(values), atol=1e-4, rtol=0)
        assert scores.std() > 0.1  # scores that are all alike would agree with anything

    check(pixels, list(PROMPTS), expected["scores"])
    check(pixels[:1].expand(16, -1, -1, -1), list(PROMPTS), expected["scores_of_image_0_by_prompt"])
    check(pixels, [PROMPTS[0]] * 16, expected["scores_of_prompt_0_by_image"])


@pytest.mark.slow
def test_scores_of_the_published_size_are_the_packages(scorer, golden):
    """ViT-L/16 and BERT base, 446 million seeded weights."""
    network = ImageRewardNetwork.from_state_dict(image_reward_weights("full"))
    scores = score_pixels(network, scorer.tokenizer, published_pixels(IMAGES), list(PROMPTS), batch_size=8)
    torch.testing.assert_close(scores, torch.tensor(golden["full"]["scores"]), atol=1e-4, rtol=0)
    assert scores.std() > 0.1


def test_whole_reward_equals_the_package_where_nothing_is_resized(tiny_image_reward, golden):
    rows = [row for row, image in enumerate(IMAGES) if image.size == (224, 224)]
    reward = load_reward(f"image_reward:{tiny_image_reward}")
    scores = reward.get_reward([IMAGES[row] for row in rows], [PROMPTS[row] for row in rows])
    expected = torch.tensor(golden["tiny"]["scores"])[rows]
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_tensors_differ_from_the_path_through_pil_by_its_rounding_only(scorer):
    for image in IMAGES:
        tensor = transforms.functional.to_tensor(image)[None]
        difference = (preprocess(tensor, 224) - published_pixels([image])).abs().max()
        # PIL rounds to 1/255 after each of its two passes; a standard deviation is about 0.26.
        assert difference < 2.5 / 255 / 0.26
    tensors = [scorer.score(transforms.functional.to_tensor(image)[None], [PROMPTS[1]]) for image in IMAGES]
    published = score_pixels(scorer.network, scorer.tokenizer, published_pixels(IMAGES), [PROMPTS[1]] * 16)
    assert (torch.cat(tensors) - published).abs().max() < 0.02


def test_score_is_the_same_alone_and_in_any_batch(tiny_image_reward):
    images = torch.stack([transforms.functional.to_tensor(image.resize((96, 80))) for image in IMAGES])
    reward = load_reward(f"image_reward:{tiny_image_reward}")
    together = reward.get_reward(images, list(PROMPTS))
    alone = torch.cat([reward.get_reward(images[row : row + 1], [PROMPTS[row]]) for row in range(16)])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = reward.get_reward(images[order], [PROMPTS[row] for row in order])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)
    torch.testing.assert_close(shuffled, together[order], atol=1e-4, rtol=0)


def test_reduced_precision_keeps_the_head_in_float32(tiny_image_reward, scorer):
    network = ImageRewardNetwork.from_state_dict(image_reward_weights("tiny")).to(torch.bfloat16)
    network.head.float()
    pixels = published_pixels(IMAGES)
    scores = score_pixels(network, scorer.tokenizer, pixels.bfloat16(), list(PROMPTS))
    expected = score_pixels(scorer.network, scorer.tokenizer, pixels, list(PROMPTS))
    assert scores.dtype == torch.float32 and not torch.equal(scores, expected)
    assert (scores - expected).abs().max() < 0.1 * expected.std()


# ------------------------------------------------------------------------------------------------- every key counts


def test_every_key_of_the_package_is_used_or_known_to_be_without_effect(golden):
    """Those that the package itself does not read may be absent; changing any other changes a score."""
    for size in ("tiny", "full"):
        assert {name.rpartition(".")[0] for name in golden[size]["keys_without_effect"]} == {
            "blip.vision_proj",
            "blip.text_proj",
        }
    weights = image_reward_weights("tiny")
    used = {name: tensor for name, tensor in weights.items() if name not in golden["tiny"]["keys_without_effect"]}
    assert len(weights) - len(used) == 4
    assert len(ImageRewardNetwork.from_state_dict(used).state_dict()) == len(used)


def test_every_tensor_that_is_read_changes_a_score(scorer):
    pixels = published_pixels(IMAGES[:4])

    def scores(network):
        return score_pixels(network, scorer.tokenizer, pixels, list(PROMPTS[:4]))

    network = ImageRewardNetwork.from_state_dict(image_reward_weights("tiny"))
    before = scores(network)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        kept = tensor.clone()
        tensor.add_(torch.randn(tensor.shape, generator=generator))
        # Attention weights do not change when every key moves alike.
        expected_to_move = not re.search(r"(attention\.self|crossattention\.self)\.key\.bias", name)
        assert (not torch.allclose(scores(network), before, rtol=0, atol=1e-5)) == expected_to_move, name
        tensor.copy_(kept)
    assert torch.equal(scores(network), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("mlp.layers.4.bias"), "1 missing: head.4.bias"),
        (lambda w: w.pop("blip.visual_encoder.blocks.1.norm2.bias"), "1 missing: vision.encoder.layers.1.layer_n"),
        (lambda w: w.pop("blip.visual_encoder.patch_embed.proj.weight"), "patch_embedding.weight is missing"),
        (lambda w: w.pop("blip.text_encoder.embeddings.word_embeddings.weight"), "word_embeddings.weight is missing"),
        (lambda w: w.update({"blip.text_encoder.surprise": torch.zeros(1)}), "1 unexpected: text.surprise"),
        (lambda w: w.update({"queue": torch.zeros(1)}), "1 unexpected: queue"),
        (lambda w: w.update({"mlp.layers.7.bias": torch.zeros(2)}), "1 wrongly shaped: head.7.bias"),
        (lambda w: w.clear(), "is missing"),
    ],
)  # fmt: skip
def test_checkpoint_that_does_not_fit_is_refused(change, said, tmp_path):
    weights = image_reward_weights("tiny")
    change(weights)
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(UserError) as caught:
        load_reward(f"image_reward:{tmp_path}/other.pt")
    message = str(caught.value)
    assert message.startswith("--reward_model image_reward:") and said in message and "\n" not in message


def test_prefix_of_ddp_wrapping_and_old_buffer_are_fine(scorer, tmp_path):
    weights = {f"module.{name}": tensor for name, tensor in image_reward_weights("tiny").items()}
    weights["module.blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    network = ImageRewardNetwork.from_state_dict(weights)
    for name, tensor in scorer.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name


def test_vocabulary_is_read_beside_the_checkpoint_and_must_fit(tmp_path):
    path = write_image_reward(tmp_path)
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("surplus\nanother\n")
    with pytest.raises(UserError, match=r"knows 210 tokens and the vocabulary of .* has 212"):
        load_reward(f"image_reward:{path}")
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"put a vocab.txt beside it.*google-bert/bert-base-uncased could not be had"):
        load_reward(f"image_reward:{path}")
    write_vocab(tmp_path / "vocab.txt")
    load_reward(f"image_reward:{tmp_path}")  # the folder will do
