"""The world of signs: its captions, its drawings and its check by templates."""

import collections

import numpy as np
import pytest

from tiny_world import signs
from tiny_world.signs import all_captions, caption_of, draw, parse, template_match, wrong_caption


def drawings(captions, seed=0, size=32):
    """One clean drawing per caption, `(B, size, size, 3)` in [0, 1]."""
    rng = np.random.default_rng(seed)
    return np.stack([np.asarray(draw(caption, rng, size)) for caption in captions]) / 255.0


def test_sets_of_captions_are_disjoint_and_each_has_every_sign_ink_and_first_digit():
    held_out, judged, study = (
        [*map(parse, captions())]
        for captions in (signs.held_out_captions, signs.judged_captions, signs.study_captions)
    )
    assert (len(held_out), len(judged), len(study)) == (32, 32, 64)
    numbers = [{number for _, number, _ in captions} for captions in (held_out, judged, study)]
    assert [len(of_set) for of_set in numbers] == [8, 8, 16]
    assert len(set.union(*numbers)) == 32  # so no set shares a number with another
    for captions in (held_out, judged, study):
        assert {number[0] for _, number, _ in captions} == set("23456789")
        assert {(sign, ink) for sign, _, ink in captions} == {(s, i) for s in signs.SIGNS for i in signs.INKS}
    assert {number[1] for number in numbers[2]} == set("0123456789")
    assert sorted(signs.training_captions()) == sorted(signs.study_captions() + signs.judged_captions())
    assert sorted(all_captions()) == sorted(signs.training_captions() + signs.held_out_captions())
    assert all(caption_of(*parse(caption)) == caption for caption in all_captions())


@pytest.mark.parametrize(
    "caption",
    ["", "a red circle", "a white sign with the number 47 in red",
     "a white sign with the number ten in red", "a white sign with the number forty seven in white"],
)  # fmt: skip
def test_a_caption_outside_of_the_grammar_is_named(caption):
    with pytest.raises(ValueError, match="not one of the signs world's") as error:
        template_match(np.zeros((1, 32, 32, 3)), [caption])
    assert repr(caption) in str(error.value)


def test_a_wrong_caption_differs_in_number_or_ink_and_keeps_its_sign():
    rng, changes = np.random.default_rng(0), collections.Counter()
    for caption in all_captions():
        before, after = parse(caption), parse(wrong_caption(caption, rng))
        assert before != after and before[0] == after[0]
        changes[before[1] != after[1], before[2] != after[2]] += 1
    assert set(changes) == {(True, False), (False, True), (True, True)}
    assert min(changes.values()) > 21  # a third of 128 each, give or take four standard deviations


@pytest.mark.parametrize("size", [32, 64])
def test_drawings_vary_and_keep_clear_of_the_border(size):
    caption = "a yellow sign with the number forty eight in blue"
    images = drawings([caption] * 20, size=size)
    assert len({image.tobytes() for image in images}) == 20
    yellow = np.array(signs.SIGNS["yellow"]) / 255
    ring = size // 16 - 1
    clear = np.ones((size, size), dtype=bool)
    clear[ring:-ring, ring:-ring] = False
    assert abs(images[:, clear] - yellow).max() < 1e-9
    assert (abs(images - yellow).max(axis=-1) > 0.3).mean(axis=(1, 2)).min() > 0.06
    again = drawings([caption] * 20, size=size)
    assert np.array_equal(images, again)


def test_templates_know_the_number_the_ink_and_the_sign():
    captions = list(np.random.default_rng(1).permutation(all_captions())[:24])
    images = drawings(captions)
    right = template_match(images, captions)
    assert right.dtype == np.float32 and right.shape == (24,)
    assert np.quantile(right, 0.05) > 0.9 and right.max() <= 1

    def changed(sign=False, number=False, ink=False):
        others = []
        for caption in captions:
            shown = parse(caption)
            of_number = signs.NUMBERS[signs.NUMBERS.index(shown[1]) - 5]
            of_ink = next(name for name in signs.INKS if name != shown[2])
            of_sign = next(name for name in signs.SIGNS if name != shown[0])
            others.append(
                caption_of(
                    of_sign if sign else shown[0], of_number if number else shown[1], of_ink if ink else shown[2]
                )
            )
        return template_match(images, others)

    for wrong in (changed(ink=True), changed(sign=True)):  # a third less, what is blurred in thin digits aside
        assert wrong.max() < 0.67 and (right - wrong).mean() > 0.3
    assert changed(number=True).mean() < 0.3


def test_blank_and_noisy_images_match_no_template():
    captions, rng = all_captions()[::11], np.random.default_rng(3)
    for level in (0.0, 0.5, 1.0):
        assert template_match(np.full((12, 32, 32, 3), level), captions).max() == 0
    assert template_match(rng.random((12, 32, 32, 3)), captions).max() < 0.1


def test_images_and_captions_must_match():
    with pytest.raises(ValueError, match="one caption each"):
        template_match(np.zeros((2, 32, 32, 3)), all_captions()[:1])
