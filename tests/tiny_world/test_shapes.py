"""The shapes world: its captions, its drawings and its reward."""

import collections
import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tiny_world.shapes import (
    all_captions,
    caption_of,
    draw,
    held_out_captions,
    judged_captions,
    parse,
    score,
    study_captions,
    training_captions,
    wrong_caption,
)


def drawings(captions, seed=0, size=32):
    """One clean drawing per caption, `(B, size, size, 3)` in [0, 1]."""
    rng = np.random.default_rng(seed)
    return np.stack([np.asarray(draw(caption, rng, size)) for caption in captions]) / 255.0


def test_the_grammar_has_54_captions_and_holds_9_out_evenly():
    everything, held_out, training = all_captions(), held_out_captions(), training_captions()
    assert len(set(everything)) == 54
    assert len(held_out) == 9 and len(training) == 45
    assert set(held_out) | set(training) == set(everything)
    assert "a red circle on a white background" in everything
    assert all(caption_of(*parse(caption)) == caption for caption in everything)
    uses = collections.Counter(name for caption in held_out for name in parse(caption))
    assert {uses[name] for name in ("circle", "square", "triangle", "white", "gray", "black")} == {3}
    assert {uses[parse(caption)[0]] for caption in everything} == {1, 2}


def test_what_the_study_judges_by_is_as_even_as_what_is_held_out_and_apart_from_it():
    judged = judged_captions()
    assert len(judged) == 9 and not set(judged) & set(held_out_captions())
    assert study_captions() == [caption for caption in training_captions() if caption not in judged]
    pairs = [pair for caption in judged for pair in itertools.combinations(parse(caption), 2)]
    assert len(set(pairs)) == len(pairs)  # each shape on each background, no colour twice with either


@pytest.mark.parametrize("caption", ["", "a pink dog", "a red circle", "A red circle on a white background."])
def test_a_caption_outside_of_the_grammar_is_named(caption):
    with pytest.raises(ValueError, match="not one of the shapes world's") as error:
        score(np.zeros((1, 32, 32, 3)), [caption])
    assert repr(caption) in str(error.value)


def test_a_wrong_caption_differs_in_colour_or_shape_and_keeps_its_background():
    rng = np.random.default_rng(0)
    changes = collections.Counter()
    for caption in all_captions() * 10:
        before, after = parse(caption), parse(wrong_caption(caption, rng))
        assert before != after and before[2] == after[2]
        changes[before[0] != after[0], before[1] != after[1]] += 1
    assert set(changes) == {(True, False), (False, True), (True, True)}
    assert min(changes.values()) > 120  # a third of 540 each, give or take four standard deviations


@pytest.mark.parametrize("size", [32, 64])
def test_clean_drawings_score_high(size):
    captions = all_captions() * (6 if size == 32 else 2)
    scores = score(drawings(captions, seed=1, size=size), captions)
    assert scores.dtype == np.float32 and scores.shape == (len(captions),)
    assert scores.min() >= 0.95 and scores.max() <= 1.0


def test_each_wrong_attribute_costs_a_third():
    captions = all_captions()
    for shown in captions[::5]:
        images = np.repeat(drawings([shown], seed=2), len(captions), axis=0)
        wrong = [sum(a != b for a, b in zip(parse(c), parse(shown), strict=True)) for c in captions]
        np.testing.assert_allclose(score(images, captions), (3 - np.array(wrong)) / 3, atol=0.03)


def test_blank_and_noisy_images_score_low():
    captions = all_captions()
    rng = np.random.default_rng(3)
    for level in (0.0, 0.5, 1.0):
        assert score(np.full((54, 32, 32, 3), level), captions).max() == 0.0
    assert score(rng.random((54, 32, 32, 3)), captions).max() < 0.15
    assert score(rng.normal(0.5, 0.2, (54, 32, 32, 3)).clip(0, 1), captions).max() < 0.15
    halves = np.zeros((54, 32, 32, 3))
    halves[:, :, 16:] = 1.0  # an edge is no figure
    assert score(halves, captions).max() < 0.4


def test_the_reward_falls_smoothly_as_a_drawing_degrades():
    captions = all_captions()
    rng = np.random.default_rng(4)
    clean = drawings(captions)
    noisy = [score((clean + rng.normal(0, sd, clean.shape)).clip(0, 1), captions).mean() for sd in (0, 0.1, 0.2)]
    assert noisy[0] > noisy[1] > noisy[2]
    pictures = [Image.fromarray((image * 255).astype(np.uint8)) for image in clean]
    blurred = [
        score(np.stack([np.asarray(p.filter(ImageFilter.GaussianBlur(radius))) for p in pictures]) / 255.0, captions)
        for radius in (1, 2, 3)
    ]
    assert 0.95 < blurred[0].mean() < 1.0 and blurred[0].mean() > blurred[1].mean() > blurred[2].mean()


def test_a_batch_scores_as_its_images_do_alone():
    captions = all_captions()[::9]
    images = drawings(captions)
    images[0] = images[0][:, ::-1] * 0.8
    alone = [score(images[i : i + 1], captions[i : i + 1])[0] for i in range(len(captions))]
    np.testing.assert_allclose(score(images, captions), alone, atol=1e-6)
    assert score(np.zeros((0, 32, 32, 3)), []).shape == (0,)


def test_images_and_captions_must_match():
    with pytest.raises(ValueError, match="one caption each"):
        score(np.zeros((2, 32, 32, 3)), all_captions()[:1])
