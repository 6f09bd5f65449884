"""The noun phrases of a prompt, by rules and word lists instead of a parser.

T2I-CompBench takes them from spaCy's parser. Its prompts are of few forms, "a red apple and a green bench" before all,
and for those the words that are never part of a noun phrase, most of which belong to closed classes, are enough.
"""

import re
import unicodedata


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words("a an the this these those some any each every another no my your his her its our their")
COPULAS = _words("am is are was were be been being")
AUXILIARIES = COPULAS | _words("has have had having do does did can could will would shall should may might must not")
PREPOSITIONS = _words("""
    of in on at by with without within from to into onto upon over under above below beneath underneath between among
    amid amidst beside besides behind beyond before after near next around along alongside across through throughout
    toward towards against about up down off out inside outside past during for like via per atop opposite despite
    until since far away
""")
CONJUNCTIONS = _words("""
    and or but nor yet while as than that which who whom whose when where if because so then though although whether
""")
PRONOUNS = _words("""
    i you he she it we they me him us them myself yourself himself herself itself ourselves themselves someone
    something everyone everything anyone anything there here what all
""")
ADVERBS = _words("""
    both together nearby apart asleep ahead aside forward backwards upwards downwards everywhere also too just even
    again always never often now
""")
# Forms that are seldom nouns or adjectives. A word right before a determiner needs no entry here ("display the
# flowers"), nor do -ed and -ing where no noun follows ("contrasted with"); see `_ends_phrase`.
VERBS = _words("""
    sit sits sat stands stood lie lies lay hang hangs hung lean leans leant hold holds held wear wears wore eat eats
    ate carry carries ride rides rode flies flew runs ran walks plays looks jumps floats hovers swims swam sleeps
    slept grows grew glows shines shone rises falls fell sank sped drove drives stretches becomes became comes came
    goes went leads led made makes takes took gives gave keeps kept wrote writes spun swung drew tells told woke
    contains reads features reflects surrounds overlooks depicts rests rest provide provides
    holding wearing carrying riding eating watching making taking giving looking having feeling chasing facing showing
    getting trying
""")
COLOURS = _words("""
    black white red green blue yellow orange brown purple pink gray grey gold golden silver beige tan cream teal
    turquoise violet magenta cyan maroon navy
""")
NOUNS_IN_ING = _words("""
    building painting drawing ceiling clothing flooring wedding morning evening string spring swing thing railing
    lighting earring sibling duckling dumpling pudding stocking icing lightning carving engraving crossing landing
    awning lining setting parking frosting dining
""")
ADJECTIVES = _words("""
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
NOUNS_IN_Y = _words("""
    family butterfly dragonfly firefly city curry lily fly body cherry berry strawberry blueberry raspberry jelly belly
    bunny puppy kitty teddy baby pony candy gallery battery balcony story lady party century country county army navy
    assembly potbelly fairy ferry jury library nursery bakery factory laundry luxury pastry ivory ruby lobby hobby sky
    galaxy daisy poppy peony ivy pansy holly canary berry entry canopy cavalry pottery jewelry memory university mercy
    burgundy
""")
NOUNS_IN_LY = _words("family butterfly dragonfly jelly belly lily fly firefly assembly potbelly")

_DETERMINER, _WORD, _COMMA, _END = "determiner", "word", "comma", "end"
_ENDS = PREPOSITIONS | CONJUNCTIONS | PRONOUNS | AUXILIARIES | ADVERBS
_TOKEN = re.compile(r"\d+(?:[:.,]\d+)+|[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]")


def noun_phrases(prompt: str) -> list[str]:
    """The base noun phrases of an English prompt, in its order and spelling, without what a preposition adds to them.

    "The black cat was sitting on a round, soft cushion" has "The black cat" and "a round, soft cushion". The rules:

    - a determiner starts a phrase, and makes a verb of the word before it, unless that follows a determiner itself;
    - punctuation and words that no noun phrase holds end it: prepositions, conjunctions, pronouns, auxiliaries,
      adverbs, common verbs, and words in -ed and -ing that no further word of a phrase follows;
    - what follows a copula without a determiner is a predicate ("the cat is black") and no phrase;
    - a comma stays inside between adjectives: "the soft, fluffy pillow", a determiner and single words before it;
    - "and" stays inside between two colours before a noun: "a black and white cat".

    Limits, against a parser: pronouns and phrases of digits alone are left out; a verb in none of the lists, with a
    bare noun or adjective behind it, is swallowed ("many stoplights flash yellow" is one phrase); "and" parts
    adjectives that are not colours ("a big and heavy box" becomes "a big" and "heavy box"); bare nouns between commas
    can be taken for adjectives ("a cat, black dog" is one phrase).

    Returns:
        The phrases, possibly none; repetitions are kept.
    """
    tokens, phrases = parse(prompt)
    return [" ".join(tokens[start:end]).replace(" ,", ",") for start, end in phrases]


def parse(prompt: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The tokens of a prompt, words and signs, and where its noun phrases begin and end among them."""
    tokens = _TOKEN.findall(unicodedata.normalize("NFC", prompt))  # an accent apart would be a sign of its own
    words = [token.lower() for token in tokens]
    kinds = _kinds(words)
    phrases: list[tuple[int, int]] = []
    start = None  # of the phrase under way
    for index, kind in enumerate(kinds):
        if kind == _WORD and start is None:
            start = index
        elif kind == _DETERMINER:
            _close(phrases, tokens, kinds, start, index)
            start = index
        elif kind in (_COMMA, _END) and start is not None and not (
            _joins_adjectives(kinds, start, index) or _joins_colours(words, kinds, start, index)
        ):  # fmt: skip
            _close(phrases, tokens, kinds, start, index)
            start = None
    return tokens, phrases


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
    if word in ADJECTIVES or word in COLOURS or word.endswith(ADJECTIVE_ENDINGS):
        return True
    if word.endswith("ed"):
        return is_participle(word)
    return len(word) > 3 and word[-1] == "y" and word[-2] not in "aeiou" and word not in NOUNS_IN_Y


def _close(phrases: list[tuple[int, int]], tokens: list[str], kinds: list[str], start: int | None, end: int) -> None:
    """Appends the tokens from `start` to `end`, if a word with a letter is among them, a determiner aside."""
    if start is not None and any(
        kind == _WORD and any(map(str.isalpha, token))
        for token, kind in zip(tokens[start:end], kinds[start:end], strict=True)
    ):
        phrases.append((start, end))


def _kinds(words: list[str]) -> list[str]:
    """What each token is to a noun phrase; the last entry stands for the end of the prompt."""
    kinds = [_kind(word) for word in words] + [_END]
    for index in reversed(range(len(words))):  # backwards: what a word is depends on what follows it
        if kinds[index] == _WORD and _ends_phrase(words, kinds, index):
            kinds[index] = _END
    predicate = False
    for index, word in enumerate(words):
        if word in COPULAS:
            predicate = words[max(index - 1, 0)] not in ("there", "here")
        elif kinds[index] != _WORD:
            predicate = predicate and word in ADVERBS
        elif predicate:
            kinds[index] = _END
            predicate = not is_participle(word)  # "is pushing red carts": the rest is an object
    return kinds


def _kind(word: str) -> str:
    if word in DETERMINERS:
        return _DETERMINER
    if word == ",":
        return _COMMA
    return _WORD if word[0].isalnum() and word not in _ENDS else _END


def _ends_phrase(words: list[str], kinds: list[str], index: int) -> bool:
    """Whether a word of an open class, with those behind it judged, is a verb or an adverb where it stands."""
    word, after = words[index], kinds[index + 1]
    before = kinds[index - 1] if index else _END
    if before == _DETERMINER:  # "a watch", "the painting", "the left"
        return False
    if after == _DETERMINER:
        return True
    if word in VERBS:
        return words[index + 1 : index + 2] != ["of"]  # "the defining features of"
    if word.endswith("ly") and word not in NOUNS_IN_LY:
        return after != _WORD
    if word in ("left", "right"):
        return before == _WORD and words[index + 1 : index + 2] == ["of"]
    if is_participle(word):
        return after == _END if index + 1 < len(words) else before == _WORD
    return False


def is_participle(word: str) -> bool:
    return (
        len(word) > 4
        and word.endswith(("ed", "ing"))
        and not word.endswith("eed")
        and word not in NOUNS_IN_ING
        and "-" not in word
    )


def _joins_adjectives(kinds: list[str], start: int, comma: int) -> bool:
    """Whether the comma lies in a list as "the soft, warm, fluffy pillow": single words, then at least two."""
    inside = kinds[start + 1 : comma]
    if kinds[start] != _DETERMINER or kinds[comma] != _COMMA or not inside or set(inside[1::2]) - {_COMMA}:
        return False
    index = comma + 1
    while kinds[index : index + 2] == [_WORD, _COMMA]:
        index += 2
    return kinds[index : index + 2] == [_WORD, _WORD]


def _joins_colours(words: list[str], kinds: list[str], start: int, index: int) -> bool:
    """Whether the word at `index` is the "and" of "a black and white cat"; not of "a red orange and brown bread"."""
    return (
        words[index : index + 1] == ["and"]
        and kinds[index + 1 : index + 3] == [_WORD, _WORD]
        and words[index + 1] in COLOURS
        and words[index - 1] in COLOURS
        and not COLOURS.intersection(words[start : index - 1])
    )
