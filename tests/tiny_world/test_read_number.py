"""The reward of the signs world, with the real network of RapidOCR, on drawn signs."""

import itertools

import numpy as np
import pytest
import torch

from reward import load_reward
from tests.support.runs import ROOT, metrics
from tiny_world.make_tiny_sdxl import build_random_sdxl
from tiny_world.read_number import ReadNumber, number_probabilities
from tiny_world.signs import all_captions, caption_of, draw, parse

SPEC = f"{ROOT}/tiny_world/read_number.py:ReadNumber"


def drawings(captions, seed=0, size=32):
    """One clean drawing per caption, `(B, 3, size, size)` in [0, 1]."""
    rng = np.random.default_rng(seed)
    pixels = np.stack([np.asarray(draw(caption, rng, size)) for caption in captions])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def captions():
    return [str(caption) for caption in np.random.default_rng(0).permutation(all_captions())[:60]]


@pytest.fixture(scope="module")
def reward():
    return load_reward(SPEC)


@pytest.mark.parametrize("size", [32, 64])
def test_drawings_are_read(size, captions):
    read = ReadNumber().read(drawings(captions, size=size))
    assert np.mean([text == parse(caption)[1] for text, caption in zip(read, captions, strict=True)]) > 0.95


def test_reward_counts_each_digit_and_the_ink(reward, captions):
    images = drawings(captions)
    right = reward.get_reward(images, captions)
    assert right.min() > 0.9 and right.max() <= 1

    def of(change):
        return reward.get_reward(images, [caption_of(*change(*parse(caption))) for caption in captions])

    def next_digit(digit):
        return str((int(digit) - 1) % 8 + 2)

    def other_ink(ink):
        return "red" if ink != "red" else "blue"

    ink = of(lambda sign, number, ink: (sign, number, other_ink(ink)))
    first = of(lambda sign, number, ink: (sign, next_digit(number[0]) + number[1], ink))
    both = of(lambda sign, number, ink: (sign, next_digit(number[0]) + next_digit(number[1]), ink))
    all_wrong = of(lambda sign, number, ink: (sign, next_digit(number[0]) + next_digit(number[1]), other_ink(ink)))
    # A quarter each for the ink, for a digit, and for the number as a whole.
    for scores, wanted in ((ink, 0.75), (first, 0.5), (both, 0.25), (all_wrong, 0)):
        np.testing.assert_allclose(scores, wanted, atol=0.12)
        assert scores.mean() == pytest.approx(wanted, abs=0.02)


def test_number_and_ink_are_logged_as_parts(reward, captions):
    images = drawings(captions)
    sign, number, ink = parse(captions[0])
    _, parts = reward.score(images[:1], [caption_of(sign, number, "red" if ink != "red" else "blue")])
    [of_number] = [value for name, value in parts.items() if name.endswith("/number")]
    [of_ink] = [value for name, value in parts.items() if name.endswith("/ink")]
    assert of_number.item() > 0.9 and of_ink.item() < 0.1


def test_blank_and_noisy_images_earn_little(reward):
    captions = all_captions()[::11]
    for level in (0.0, 0.5, 1.0):
        assert reward.get_reward(torch.full((12, 3, 32, 32), level), captions).max() < 0.1
    plain = torch.tensor([225.0, 30, 35]).view(3, 1, 1).expand(12, 3, 32, 32) / 255  # the colour of an ink
    assert reward.get_reward(plain, captions).max() < 0.1
    noise = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert reward.get_reward(noise, captions).mean() < 0.1


def test_score_is_the_same_alone_and_in_any_batch(reward, captions):
    images = drawings(captions)
    alone = [reward.get_reward(images[row : row + 1], captions[row : row + 1]).item() for row in (0, 40)]
    np.testing.assert_allclose(reward.get_reward(images, captions)[[0, 40]], alone, atol=1e-5)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (1, 1)])
def test_probabilities_are_sums_over_all_that_the_frames_can_spell(first, second):
    frames = np.random.default_rng(0).dirichlet(np.ones(4), size=5)  # character 0 is the blank
    starts = ends = alone = 0.0
    for path in itertools.product(range(4), repeat=5):
        likely = np.prod(frames[range(5), path])
        text = [shown for shown, _ in itertools.groupby(path) if shown]
        starts += likely * (text[:1] == [first])
        ends += likely * (text[-1:] == [second])
        alone += likely * (text == [first, second])
    np.testing.assert_allclose(number_probabilities(frames, first, second), (starts, ends, alone), rtol=1e-12)


@pytest.mark.parametrize("method", ["RLHF"])  # of the fixtures train and flags
def test_a_training_script_runs_with_it(method, train, flags, tmp_path):
    build_random_sdxl(tmp_path / "model", world="signs")
    (tmp_path / "prompts.txt").write_text("\n".join(all_captions()[:8]))
    changes = {"preset": "efficient", "infer_steps": 2, "num_noisy_latents": 2, "train_data_dir": None}
    changes |= {"pretrained_model_name_or_path": tmp_path / "model", "prompts_file": tmp_path / "prompts.txt"}
    assert train(flags(reward_model=SPEC, max_train_steps=1, **changes)) == 0
    assert 0 <= metrics(tmp_path / "run")[0]["reward/mean"] <= 1
