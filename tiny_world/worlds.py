"""The tiny worlds by name: what the commands that make a data set and a tiny SDXL need of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tiny_world import shapes, signs


@dataclass(frozen=True)
class World:
    """Captions, drawings of them, and what is made of both.

    Attributes:
        captions: by name of the set: "all", those that are "held_out" and all others, "training"; of these, the
            "judged" and the others, "study".
        draw: an image of a caption, `(caption, rng, size)`.
        wrong_caption: another caption than the given one, `(caption, rng)`.
        score: how well images `(B, H, W, 3)` in [0, 1] follow their captions, `(B,)` in [0, 1].
        words: of the grammar; each becomes one token.
        many_words: so many that the pooled features of a random text encoder must be standardised to tell captions
            apart.
    """

    captions: Mapping[str, Callable[[], list[str]]]
    draw: Callable[[str, np.random.Generator, int], Image.Image]
    wrong_caption: Callable[[str, np.random.Generator], str]
    score: Callable[[np.ndarray, list[str]], np.ndarray]
    words: tuple[str, ...]
    many_words: bool


WORLDS = {
    "shapes": World(
        {
            "all": shapes.all_captions,
            "training": shapes.training_captions,
            "held_out": shapes.held_out_captions,
            "judged": shapes.judged_captions,
            "study": shapes.study_captions,
        },
        shapes.draw,
        shapes.wrong_caption,
        shapes.score,
        ("a", "on", "background", *shapes.COLOURS, *shapes.SHAPES, *shapes.BACKGROUNDS),
        many_words=False,
    ),
    "signs": World(
        {
            "all": signs.all_captions,
            "training": signs.training_captions,
            "held_out": signs.held_out_captions,
            "judged": signs.judged_captions,
            "study": signs.study_captions,
        },
        signs.draw,
        signs.wrong_caption,
        signs.template_match,
        ("a", "sign", "with", "the", "number", "in", *signs.TENS, *signs.ONES[1:], *signs.SIGNS, *signs.INKS),
        many_words=True,
    ),
}
