"""T2I-CompBench's spatial rule: which relation a prompt holds, and its score for boxes, worked out by hand."""

import pytest

from sharpening.rewards.adjectives import without_adjectives
from sharpening.rewards.spatial_relation import (
    Detection,
    Relation,
    find_relation,
    holds,
    scale_of_benchmark,
    spatial_score,
)

RELATIONS = {
    # The benchmark's spatial prompts have the words of this form, and these relations.
    "a bird next to a cup": ("near", "bird", "cup"),
    "a mouse near a bowl": ("near", "mouse", "bowl"),
    "a fish on side of a sofa": ("near", "fish", "sofa"),
    "a key on the left of a butterfly": ("left", "key", "butterfly"),
    "a cup on the right of a dog": ("right", "cup", "dog"),
    "a bee on the bottom of a airplane": ("bottom", "bee", "airplane"),
    "a cat on the top of a sofa": ("top", "cat", "sofa"),
    "A girl on the LEFT of a Man": ("left", "person", "person"),
    "a boy on the top of a woman": ("top", "person", "person"),
    # And its complex prompts these.
    "The red hat was on top of the brown coat rack.": ("top", "hat", "coat rack"),
    "The blue water bottle was on top of the red backpack.": ("top", "water bottle", "backpack"),
    "The striped rug was next to the wooden bench.": ("near", "rug", "bench"),
    "The round clock is on the right of the rectangular picture frame.": ("right", "clock", "picture frame"),
    "The soft pillow was on bottom of the hard rocking chair.": ("bottom", "pillow", "rocking chair"),
    # What else users write.
    "two dogs on the left of 3 cats": ("left", "two dogs", "cats"),
    "a photo of a dog next to a cat, oil painting, highly detailed": ("near", "dog", "cat"),
    "an orange next to a lemon": ("near", "orange", "lemon"),
    "a t-shirt near a striped black and white zebra": ("near", "t-shirt", "zebra"),
    "a cat that is black and next to a dog": ("near", "cat", "dog"),
    "a cat near a dog on the left of a bird": ("near", "cat", "dog"),  # the first counts
    "a dog near and next to a cat": ("near", "dog", "cat"),
}

WITH_ACTION = {
    "The sleek black cat sat on top of the fluffy white pillow.": ("top", "cat", "pillow"),
    "The colorful balloons floated near the silver airplane": ("near", "balloons", "airplane"),
    "The bright yellow sunflower stood tall next to the soft green grass.": ("near", "sunflower", "grass"),
    "The fluffy white cat snuggled up next to the warm brown blanket.": ("near", "cat", "blanket"),
    "The striped black and white cat lay next to the soft grey blanket.": ("near", "cat", "blanket"),
    "The yellow duckling is swimming next to the black swan.": ("near", "duckling", "swan"),
    "a dog wearing a hat next to a cat": ("near", "hat", "cat"),
    "a dog next to a cat eating a fish": ("near", "dog", "cat"),
}

NONE = ["", "a cat", "a cat and a dog", "next to a cat", "a cat next to", "the next to the", "a nearby cat and a dog",
        "1 next to 2", "a cat sits on a sofa", "a rectangular mirror hung above the white sink",
        "The sun sank below the horizon"]  # fmt: skip


@pytest.mark.parametrize("prompt", [*RELATIONS, *WITH_ACTION])
def test_relation_of(prompt):
    action = prompt in WITH_ACTION
    assert find_relation(prompt) == Relation(*(WITH_ACTION if action else RELATIONS)[prompt], action)


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [
        ("a 4x4 on the left of a house", "4x4", "house"), ("a 7up next to a dog", "7up", "dog"),
        ("a 1st near a 2nd", "1st", "2nd"),
    ],
)  # fmt: skip
def test_thing_may_begin_with_a_digit(prompt, first, second):
    relation = find_relation(prompt)
    assert (relation.first, relation.second) == (first, second)


@pytest.mark.parametrize("prompt", NONE)
def test_no_relation_in(prompt):
    assert find_relation(prompt) is None


@pytest.mark.parametrize(
    ("prompt", "without"),
    [
        ("The red hat was on top of the old wooden coat rack.", "The hat was on top of the coat rack ."),
        ("the round, soft cushion and a famous bakery", "the , cushion and a bakery"),
        ("a striped rug near a rocking chair", "a rug near a rocking chair"),
        ("a leather city map on a big orange", "a leather city map on a orange"),
        ("", ""),
    ],
)
def test_adjectives_are_left_out(prompt, without):
    assert without_adjectives(prompt) == without


def box(x, y, width=40, height=40):
    """A box by its centre."""
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


HELD = [
    # place, centre of the second thing when the first is at (240, 240), how well the relation holds
    ("left", (300, 200), 1),
    ("left", (300, 180), 0),  # as far along the other axis
    ("left", (300, 299), 1),
    ("left", (180, 240), 0),  # on the other side
    ("left", (240, 240), 0),
    ("right", (180, 200), 1),
    ("right", (300, 240), 0),
    ("right", (180, 310), 0),
    ("top", (200, 300), 1),
    ("top", (240, 180), 0),
    ("top", (310, 300), 0),
    ("bottom", (240, 180), 1),
    ("bottom", (240, 300), 0),
    # 40 px squares 20 px apart share 800 of 2400 px: 0.1 / (1 / 3)
    ("left", (260, 240), 0.3),
    ("right", (220, 240), 0.3),
    ("top", (240, 260), 0.3),
    ("bottom", (240, 220), 0.3),
    # 32 px apart they share 320 of 2880: 0.1 / (1 / 9); 33 px apart 280 of 2920, less than 0.1
    ("left", (272, 240), 0.9),
    ("left", (273, 240), 1),
    ("near", (240, 240), 1),
    ("near", (389, 480), 1),
    ("near", (480, 91), 1),
    ("near", (390, 390), 1),  # 150 / 150
    ("near", (440, 400), 0.75),  # 150 / 200
    ("near", (80, 0), 0.625),  # 150 / 240
]


@pytest.mark.parametrize(("place", "second", "held"), HELD)
def test_how_well_a_relation_holds(place, second, held):
    assert holds(place, box(240, 240), box(*second)) == pytest.approx(held)


def test_boxes_without_area_do_not_overlap():
    assert holds("left", (0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert holds("left", (5, 5, 5, 5), (9, 5, 9, 5)) == 1


@pytest.mark.parametrize(
    ("place", "scores", "second", "total"),
    [
        ("left", (0.8, 0.6), (300, 240), 0.25 * 1.4 + 0.5),
        ("left", (0.8, 0.6), (180, 240), 0),  # 0.35
        ("left", (0.9, 0.9), (260, 240), 0.45 + 0.15),
        ("left", (0.6, 0.7), (260, 240), 0),  # 0.325 + 0.15
        ("near", (0.5, 0.3), (440, 400), 0.2 + 0.375),
        ("near", (1, 1), (0, 480), 0.5 + 0.5 * 0.625),
        ("top", (0, 0), (240, 300), 0.5),
        ("top", (1, 1), (240, 180), 0.5),  # nothing holds, and the detector has no doubt
    ],
)
def test_score(place, scores, second, total):
    first, second = (Detection(score, box(*at)) for score, at in zip(scores, [(240, 240), second], strict=True))
    assert spatial_score(place, first, second) == pytest.approx(total)
    assert spatial_score(place, first, None) == spatial_score(place, None, second) == 0
    assert spatial_score(place, None, None) == 0


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((512, 512), (479, 479)), ((1024, 1024), (479, 479)), ((480, 640), (360, 480)), ((64, 32), (480, 240))],
)
def test_images_are_measured_at_the_benchmarks_size(size, scaled):
    scale = scale_of_benchmark(*size)
    assert (scale * size[0], scale * size[1]) == pytest.approx(scaled)
