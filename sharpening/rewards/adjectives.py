"""Adjectives before their noun, by word lists and endings: what a detector and CLIP are asked without."""

from sharpening.rewards.noun_phrases import COLOURS, PURE_ADJECTIVES, is_participle, parse, word_list

ADJECTIVES = word_list("""
    big small large little tiny huge tall short long high low deep shallow wide narrow thick thin fat slim heavy light
    old new young ancient modern fresh ripe raw hot warm cool cold wet damp dry hard soft rough smooth sharp blunt flat
    round square circular rectangular triangular oval spherical cylindrical conical pentagonal hexagonal angular curved
    straight sleek crisp clean plain bright dark dim dull pale vivid rich sweet sour bitter tart tender loud quiet calm
    fast slow strong weak full open distant grand elegant delicate intricate fragrant vibrant translucent transparent
    opaque matte tropical natural geometric compact lush plush plump bold abstract beautiful pretty ugly happy sad
    gentle humble simple subtle fragile fierce wild rare good bad great fine busy empty
    wooden woollen woolen golden molten metallic
""")
ADJECTIVE_ENDINGS = ("ful", "less", "ous", "ish", "able", "ible", "escent", "some")
NOUNS_IN_Y = word_list("""
    family butterfly dragonfly firefly city curry lily fly body cherry berry strawberry blueberry raspberry jelly belly
    bunny puppy kitty teddy baby pony candy gallery battery balcony story lady party century country county army navy
    assembly potbelly fairy ferry jury library nursery bakery factory laundry luxury pastry ivory ruby lobby hobby sky
    galaxy daisy poppy peony ivy pansy holly canary berry entry canopy cavalry pottery jewelry memory university mercy
    burgundy
""")


def without_adjectives(prompt: str) -> str:
    """The tokens of a prompt, parted by spaces, without the adjectives of its noun phrases."""
    tokens, phrases = parse(prompt)
    inside = {index for start, end in phrases for index in range(start, end - 1)}  # the last word is the noun
    return " ".join(
        token for index, token in enumerate(tokens) if index not in inside or not is_adjective(token.lower())
    )


def is_adjective(word: str) -> bool:
    """Whether a word, lower case, is an adjective where another word of its noun phrase follows.

    Judged by word lists and endings: "old", "wooden", "fluffy", "striped"; not "coat", "leather", "rocking".
    """
    if word in ADJECTIVES | PURE_ADJECTIVES | COLOURS or word.endswith(ADJECTIVE_ENDINGS):
        return True
    if word.endswith("ed"):
        return is_participle(word)
    return len(word) > 3 and word[-1] == "y" and word[-2] not in "aeiou" and word not in NOUNS_IN_Y
