"""The noun phrases that BLIP-VQA asks for, on prompts of T2I-CompBench's forms and on what else users write."""

import json
from pathlib import Path

import pytest

from sharpening.rewards.noun_phrases import noun_phrases

PHRASES = {
    # The benchmark's template, four fifths of its colour, shape and texture prompts.
    "a red apple and a green bench": ["a red apple", "a green bench"],
    "a round cookie and a square container.": ["a round cookie", "a square container"],
    "a metallic desk lamp and a fluffy blanket": ["a metallic desk lamp", "a fluffy blanket"],
    "a wooden chair and a leather sofa": ["a wooden chair", "a leather sofa"],
    "an oblong cucumber and a teardrop plum": ["an oblong cucumber", "a teardrop plum"],
    "rubber sole shoes and fluffy clouds": ["rubber sole shoes", "fluffy clouds"],
    "a metallic watch and wooden chopsticks": ["a metallic watch", "wooden chopsticks"],
    "a triangular slice of pizza and a cubic Rubik's cube": ["a triangular slice", "pizza", "a cubic Rubik's cube"],
    # Sentences.
    "a red circle on a white background": ["a red circle", "a white background"],
    "The black cat was sitting on the couch": ["The black cat", "the couch"],
    "The soft, fluffy pillow and the smooth silk curtains": ["The soft, fluffy pillow", "the smooth silk curtains"],
    "a soft, warm, woollen blanket": ["a soft, warm, woollen blanket"],
    "A black and white cat sits in a white sink.": ["A black and white cat", "a white sink"],
    "a red orange and brown bread": ["a red orange", "brown bread"],
    "The glass vase and metallic stand display the wooden flowers on the fabric dresser.":
        ["The glass vase", "metallic stand", "the wooden flowers", "the fabric dresser"],
    "The leather couch and fluffy pillow provide comfort on the wooden floor":
        ["The leather couch", "fluffy pillow", "comfort", "the wooden floor"],
    "The fluffy cat is on the left of the soft pillow.": ["The fluffy cat", "the soft pillow"],
    "The red hat was on top of the brown coat rack.": ["The red hat", "the brown coat rack"],
    "a lamp on the side of a bed, on the right a chair": ["a lamp", "a bed", "a chair"],
    "a red top on the left side": ["a red top", "the left side"],
    "a small red cube left of a large blue sphere": ["a small red cube", "a large blue sphere"],
    "The soft pink petals contrasted with the rough brown bark.": ["The soft pink petals", "the rough brown bark"],
    "Many lights shone on a snow covered street": ["Many lights", "a snow covered street"],
    "A woman in a white shirt and jeans holds a pink umbrella in the rain.":
        ["A woman", "a white shirt", "jeans", "a pink umbrella", "the rain"],
    "two white sheep, a black goat and a white goat in a field":
        ["two white sheep", "a black goat", "a white goat", "a field"],
    "The big book and the small notepad were both useful for different purposes.":
        ["The big book", "the small notepad", "different purposes"],
    "The diamond rings were the defining features of the ancient temple.":
        ["The diamond rings", "the defining features", "the ancient temple"],
    "A person is wearing a chef's hat and cooking a gourmet meal.": ["A person", "a chef's hat", "a gourmet meal"],
    "A child is playing with a toy train while its mother is looking at her":
        ["A child", "a toy train", "its mother", "her"],
    "The glowing moon rose above the calm sea.": ["The glowing moon", "the calm sea"],
    "a red rose on a white table": ["a red rose", "a white table"],
    "The vase with its diamond pattern and circular mouth displayed flowers in the room.":
        ["The vase", "its diamond pattern", "circular mouth", "flowers", "the room"],
    "The small shop stocked lamps of all sizes.": ["The small shop", "lamps", "sizes"],
    "A room with tiled walls and a snow covered roof.": ["A room", "tiled walls", "a snow covered roof"],
    "The wooden crib and fluffy blanket wait for the baby.": ["The wooden crib", "fluffy blanket", "the baby"],
    "a cubic book and a cylindrical can of soup": ["a cubic book", "a cylindrical can", "soup"],
    "a metallic watering can and a glass that can break": ["a metallic watering can", "a glass", "break"],
    "a tall oak tree and a short sapling": ["a tall oak tree", "a short sapling"],
    "the long meeting in the modern building": ["the long meeting", "the modern building"],
    "a man standing on a hill, a dog running": ["a man", "a hill", "a dog"],
    "The only pieces left in the box were tall": ["The only pieces", "the box"],
    "The things visible in the night sky stood tall": ["The things", "the night sky"],
    "Both were fashionable choices for serving dinner.": ["fashionable choices", "dinner"],
    "It fascinated him when she painted the past.": ["It", "him", "she", "the past"],
    "a big and heavy box, a red and a blue one": ["a big and heavy box", "a red", "a blue one"],
    "A man is pushing red carts and the sky is blue": ["A man", "red carts", "the sky"],
    "There are three dogs and two cats in a building": ["three dogs", "two cats", "a building"],
    "The white clock with a red roof reads 11:44.": ["The white clock", "a red roof"],
    # Awkward ones.
    "": [],
    "  ,.!? ": [],
    "the": [],
    "of and with": [],
    "1234": [],
    "cat": ["cat"],
    "BLUE CAR": ["BLUE CAR"],
    "a cat, dog and bird": ["a cat", "dog", "bird"],
    "a dog, a dog": ["a dog", "a dog"],
    "cafe\u0301 and an O\u0308l lamp 🚀": ["café", "an Öl lamp"],
    'wow!!! a dog... (running), "fast" & far-away; #art': ["wow", "a dog", "fast", "far-away", "art"],
    "portrait of a smiling woman, film grain, 35mm,\ngolden hour, by the window":
        ["portrait", "a smiling woman", "film grain", "35mm", "golden hour", "the window"],
}  # fmt: skip


@pytest.mark.parametrize("prompt", PHRASES)
def test_phrases(prompt):
    assert noun_phrases(prompt) == PHRASES[prompt]


GOLDEN = json.loads(Path(__file__).with_name("noun_phrases_golden.json").read_text())["phrases"]


@pytest.mark.parametrize(("form", "share"), [("color", 0.98), ("shape", 0.98), ("texture", 0.9), ("complex", 0.94)])
def test_phrases_are_those_of_the_parser(form, share):
    """On 50 made-up prompts of each of the benchmark's forms, the parser's mistakes among them."""
    wrong = {prompt: noun_phrases(prompt) for prompt, found in GOLDEN[form].items() if noun_phrases(prompt) != found}
    assert len(GOLDEN[form]) == 50
    assert 1 - len(wrong) / 50 >= share, wrong


LIMITS = {
    "many stoplights flash yellow on a street": ["many stoplights flash yellow", "a street"],
    "a cat, black dog": ["a cat, black dog"],
    "the cat that is on the table": ["the cat", "the table"],
}


@pytest.mark.parametrize("prompt", LIMITS)
def test_known_limits_are_as_the_docstring_says(prompt):
    assert noun_phrases(prompt) == LIMITS[prompt]


def test_every_prompt_of_the_captioned_shapes_is_shape_and_background():
    from tiny_world.shapes import HELD_OUT, training_captions

    for caption in (*HELD_OUT, *training_captions()):
        assert noun_phrases(caption) == caption.split(" on ")
