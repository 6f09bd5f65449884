"""T2I-CompBench's rule for spatial relations (Huang et al. 2023, arXiv 2307.06350), on prompts and boxes alone.

As in the benchmark's code (UniDet_eval): which words are a relation, the first detection of each thing, the distance
and overlap of their boxes, and what becomes of the scores. What differs:

- the things come from rules (`sharpening/rewards/noun_phrases.py`) and not from spaCy: the noun phrases right before
  and right after the relation, without determiner and adjectives. Of "a coat rack" the benchmark asks for "coat" or
  "rack", whichever is nearer to the relation, because its detector knows single words; here it is "coat rack";
- "on top of", which the benchmark reads and then has no rule for, so that it scores 0, follows the rule of top, and
  "on bottom of", which it has neither in its list nor in a rule, that of bottom;
- of several relations the first counts; the benchmark takes the prompt's first and last noun, or gives 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from sharpening.rewards.adjectives import is_adjective
from sharpening.rewards.noun_phrases import (
    ADVERBS,
    AUXILIARIES,
    CONJUNCTIONS,
    COPULAS,
    DETERMINERS,
    PREPOSITIONS,
    PRONOUNS,
    is_participle,
    parse,
)

Place = Literal["near", "left", "right", "top", "bottom"]

RELATIONS: dict[str, Place] = {
    "next to": "near",
    "near": "near",
    "on side of": "near",
    "on the left of": "left",
    "on the right of": "right",
    "on the top of": "top",
    "on the bottom of": "bottom",
    "on top of": "top",
    "on bottom of": "bottom",
}
PEOPLE = frozenset({"girl", "boy", "man", "woman"})  # the benchmark looks for a person in their place
MAX_OVERLAP = 0.1  # intersection over union from which things count as lying upon each other
MAX_DISTANCE = 150  # px, up to which things are near
_NO_THING = DETERMINERS | CONJUNCTIONS  # what noun phrases hold besides, as "black and white"
_NO_VERB = PREPOSITIONS | CONJUNCTIONS | PRONOUNS | AUXILIARIES | ADVERBS | DETERMINERS


class Detection(NamedTuple):
    """A thing that a detector found.

    Attributes:
        score: how sure it is, in [0, 1].
        box: left, top, right and bottom edge, in px.
    """

    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Relation:
    """What a prompt says of the places of two things.

    Attributes:
        place: where the first thing is, seen from the second.
        first, second: what to look for, lower case.
        action: whether it also says what happens: "a cat sat next to a dog", not "a cat is next to a dog".
    """

    place: Place
    first: str
    second: str
    action: bool


def find_relation(prompt: str) -> Relation | None:
    """The first relation of a prompt with a thing on either side of it, or None."""
    tokens, phrases = parse(prompt)
    words = [token.lower() for token in tokens]
    things = [
        (start, end)
        for start, end in phrases
        if end - start > 1 or not (is_adjective(words[start]) or words[start] in PRONOUNS)
    ]
    for index in range(len(words)):
        for relation, place in RELATIONS.items():
            end = index + len(relation.split())
            before = [phrase for phrase in things if phrase[1] <= index]
            after = [phrase for phrase in things if phrase[0] >= end]
            if words[index:end] == relation.split() and before and after:
                first, second = (_thing(words[slice(*phrase)]) for phrase in (before[-1], after[0]))
                return Relation(place, first, second, _has_action(words, phrases, index, end))
    return None


def _thing(phrase: list[str]) -> str:
    """What to look for: the phrase without determiner and adjectives, up to a comma that no adjective precedes."""
    commas = [index for index, word in enumerate(phrase) if word == "," and not is_adjective(phrase[index - 1])]
    phrase = phrase[: min(commas, default=None)]
    *modifiers, noun = [word for word in phrase if any(map(str.isalpha, word)) and word not in _NO_THING] or phrase
    return "person" if noun in PEOPLE else " ".join([*(word for word in modifiers if not is_adjective(word)), noun])


def _has_action(words: list[str], phrases: list[tuple[int, int]], start: int, end: int) -> bool:
    """Whether a verb other than a form of "be" stands in the part of the sentence that holds words[start:end]."""
    known = {index for phrase in (*phrases, (start, end)) for index in range(*phrase)}
    predicate = False  # "is black": an adjective, and no action
    for index, word in enumerate(words):
        if index >= end and not word[0].isalnum():
            return False
        if word in COPULAS:
            predicate = True
        elif index in known or word in _NO_VERB or word.endswith("ly") or not word.isalpha():
            predicate = predicate and word in ADVERBS
        elif not predicate or is_participle(word):
            return True
    return False


def scale_of_benchmark(height: int, width: int) -> float:
    """What brings an image to the size at which the benchmark measures: 479 px at its shorter side, 480 at most."""
    return min(479 / min(height, width), 480 / max(height, width))


def spatial_score(place: Place, first: Detection | None, second: Detection | None) -> float:
    """0.25 x the scores of both detections + 0.5 x how well the relation holds; 0 where that is below 0.5.

    So a thing that is missing (None) makes it 0, and so does a relation that does not hold.

    Args:
        place: where the first thing should be, seen from the second.
        first, second: their detections; boxes in px of an image at `scale_of_benchmark`.

    Returns:
        0, or a number in [0.5, 1].
    """
    if first is None or second is None:
        return 0.0
    score = 0.25 * (first.score + second.score) + 0.5 * holds(place, first.box, second.box)
    return score if score >= 0.5 else 0.0


def holds(place: Place, first: tuple[float, float, float, float], second: tuple[float, float, float, float]) -> float:
    """How well a relation holds between two boxes (left, top, right, bottom; px), in [0, 1].

    near: 1 if the centres are less than 150 px apart along either axis, else 150 px / the larger of both distances.
    left, right, top, bottom: 0 unless the first centre lies on that side and is farther away along this axis than
    along the other; then 1, or 0.1 / IoU if the boxes' intersection over union is at least 0.1.
    """
    dx = (second[0] + second[2] - first[0] - first[2]) / 2
    dy = (second[1] + second[3] - first[1] - first[3]) / 2
    if place == "near":
        if min(abs(dx), abs(dy)) < MAX_DISTANCE:
            return 1.0
        return MAX_DISTANCE / max(abs(dx), abs(dy))
    along, across = (dx, dy) if place in ("left", "right") else (dy, dx)
    if place in ("right", "bottom"):
        along = -along
    if along <= abs(across):
        return 0.0
    overlap = _intersection_over_union(first, second)
    return 1.0 if overlap < MAX_OVERLAP else MAX_OVERLAP / overlap


def _intersection_over_union(
    first: tuple[float, float, float, float], second: tuple[float, float, float, float]
) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(width, 0) * max(height, 0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - common
    return common / union if union else 0.0
