"""The noun phrases of a prompt, by rules and word lists instead of a parser.

T2I-CompBench takes them from spaCy's parser. Its prompts are of few forms, "a red apple and a green bench" before all,
and for those the words that are never part of a noun phrase, most of which belong to closed classes, are enough: of
its 300 validation prompts each, 92% (color), 94% (shape), 89% (texture) and 92% (complex) have the very list that
spaCy's en_core_web_sm 3.8 gives its code (`python tests/rewards/make_noun_phrases_golden.py --prompts FILE`); most
others are mistakes of the parser.
"""

import re
import unicodedata


def word_list(text: str) -> frozenset[str]:
    """The words of a text, parted by white space."""
    return frozenset(text.split())


DETERMINERS = word_list("a an the this these those some any each every another no my your his her its our their")
COPULAS = word_list("am is are was were be been being")
AUXILIARIES = COPULAS | word_list(
    "has have had having do does did can could will would shall should may might must not"
)
PREPOSITIONS = word_list("""
    of in on at by with without within from to into onto upon over under above below beneath underneath between among
    amid amidst beside besides behind beyond before after near next around along alongside across through throughout
    toward towards against about up down off out inside outside past during for like via per atop opposite despite
    until since far away
""")
CONJUNCTIONS = word_list("""
    and or but nor yet while as than that whose when where if because so then though although whether
""")
ADVERBS = word_list("""
    both together nearby apart asleep ahead aside forward backwards upwards downwards everywhere also too just even
    again always never often now there here all
""")
SUBJECTS = word_list("i you he she it we they who which")  # what follows them is a verb
PRONOUNS = SUBJECTS | word_list("""
    me him us them whom what myself yourself himself herself itself ourselves themselves someone something everyone
    everything anyone anything
""")
# Forms that are seldom nouns or adjectives. A word right before a determiner needs no entry here ("display the
# flowers"), nor do -ed and -ing where no noun follows ("contrasted with"); see `_ends_phrase`.
VERBS = word_list("""
    sit sits sat stands stood lie lies lay hang hangs hung lean leans leant hold holds held wear wears wore eat eats
    ate carry carries ride rides rode flies flew runs ran walks plays looks jumps floats hovers swims swam sleeps
    slept grows grew glows shines shone rises falls fell sank sped drove drives stretches becomes became comes came
    goes went leads led made makes takes took gives gave keeps kept wrote writes spun swung drew tells told woke
    contains reads features reflects surrounds overlooks depicts rests rest provide provides strode blew swept crept
    leapt clung struck shook sang caught cast provided displayed attracted offered contained
    holding wearing carrying riding eating watching making taking giving looking having feeling chasing facing showing
    getting trying telling bringing reaching
""")
PASTS = word_list(
    "rose cut burst spread lit"
)  # nouns or adjectives as well; verbs after a noun and before a preposition
COLOURS = word_list("""
    black white red green blue yellow orange brown purple pink gray grey gold golden silver beige tan cream teal
    turquoise violet magenta cyan maroon navy
""")
# Besides what `_ADJECTIVAL` matches: of size, shape, surface, age and the like; those that are seldom nouns.
PURE_ADJECTIVES = word_list("""
    big small large tiny huge tall short long high low wide narrow deep shallow thick thin heavy soft hard rough smooth
    fluffy fuzzy furry silky glossy shiny sleek bumpy jagged spiky sharp blunt crisp crunchy juicy ripe fresh spicy
    warm hot bright dim empty full upright loose tight clean dirty dusty rusty old new young ancient modern pretty
    lovely cozy quiet busy gentle delicate elegant ornate rich natural perfect ready visible happy sad alone alive
    awake wooden woollen metallic spherical cubic oblong pyramidal
""")
NOUNS_IN_ING = word_list("""
    building painting drawing ceiling clothing flooring wedding morning evening string spring swing thing railing
    lighting earring sibling duckling dumpling pudding stocking icing lightning carving engraving crossing landing
    awning lining setting parking frosting dining sapling seedling gosling fledgling hatchling starling herring viking
    stitching seating bedding
""")
NOUNS_IN_LY = word_list("family butterfly dragonfly jelly belly lily fly firefly assembly potbelly")
CANS = word_list("watering trash garbage soda tin spray paint beer")  # after them "can" is a noun
# What the parser finds in "on the left of" and its like; T2I-CompBench asks nothing for them.
PLACES = frozenset({"top", "the side", "the left", "the right"})

_DETERMINER, _WORD, _PRONOUN, _COMMA, _END = "determiner", "word", "pronoun", "comma", "end"
_ENDS = PREPOSITIONS | CONJUNCTIONS | AUXILIARIES | ADVERBS
_TOKEN = re.compile(r"\d+(?:[:.,]\d+)+|[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]")
_ADJECTIVAL = re.compile(r"(?!hand|arm|mouth|cup|spoon)\w+(?:ful|ous|less|gonal|ical|ular)")


def noun_phrases(prompt: str) -> list[str]:
    """The base noun phrases of an English prompt, in its order and spelling, without what a preposition adds to them.

    "The black cat was sitting on a round, soft cushion" has "The black cat" and "a round, soft cushion". The rules:

    - a determiner starts a phrase, and makes a verb of the word before it, unless that follows a determiner itself;
    - punctuation and words that no noun phrase holds end it: prepositions, conjunctions, auxiliaries, adverbs, common
      verbs, and words in -ed and -ing that no further word of a phrase follows, but for "a long meeting";
    - a sentence ("The" first, a full stop last) that has no verb by these rules gets one: see `_swallowed_verb`;
    - a pronoun is a phrase of its own, and the word after "she" or "which" is a verb;
    - what follows a copula without a determiner is a predicate ("the cat is black") and no phrase, unless it is of
      several words with a plural last ("they were bright lamps");
    - adjectives behind their noun, or alone, are left out ("the only things visible", "stood tall");
    - a comma stays inside between adjectives: "the soft, fluffy pillow", a determiner and single words before it;
    - "and" stays inside between two colours or two adjectives before a noun: "a black and white cat";
    - "top", "the side", "the left" and "the right" are left out, as T2I-CompBench does.

    Limits, against a parser: phrases of digits alone and "that" are left out; a verb in none of the lists, with a bare
    noun or adjective behind it, is swallowed ("many stoplights flash yellow" is one phrase); bare nouns between commas
    can be taken for adjectives ("a cat, black dog" is one phrase).

    Returns:
        The phrases, possibly none; repetitions are kept.
    """
    tokens, spans = parse(prompt)
    phrases = [" ".join(tokens[start:end]).replace(" ,", ",") for start, end in spans]
    return [phrase for phrase in phrases if phrase.lower() not in PLACES]


def parse(prompt: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The tokens of a prompt, words and signs, and where its noun phrases begin and end among them, `PLACES` too."""
    tokens = _TOKEN.findall(unicodedata.normalize("NFC", prompt))  # an accent apart would be a sign of its own
    words = [token.lower() for token in tokens]
    kinds = _kinds(words)
    phrases: list[tuple[int, int]] = []
    start = None  # of the phrase under way
    for index, kind in enumerate(kinds):
        if kind == _WORD and start is None:
            start = index
        elif kind == _DETERMINER:
            phrases += _phrase(words, kinds, start, index)
            start = index
        elif kind == _PRONOUN:
            phrases += [*_phrase(words, kinds, start, index), (index, index + 1)]
            start = None
        elif kind in (_COMMA, _END) and start is not None and not (
            _joins_at_comma(kinds, start, index) or _joins_at_and(words, kinds, start, index)
        ):  # fmt: skip
            phrases += _phrase(words, kinds, start, index)
            start = None
    return tokens, phrases


def _phrase(words: list[str], kinds: list[str], start: int | None, end: int) -> list[tuple[int, int]]:
    """The phrase from `start` to `end`, if there is one, without the adjectives behind its noun."""
    if start is None:
        return []
    nouns = [i for i in range(start, end) if kinds[i] == _WORD and not _is_pure_adjective(words[i])]
    if nouns:
        end = nouns[-1] + 1
    elif kinds[start] != _DETERMINER:
        return []
    found = [word for word, kind in zip(words[start:end], kinds[start:end], strict=True) if kind == _WORD]
    return [(start, end)] if any(map(str.isalpha, "".join(found))) else []


def _kinds(words: list[str]) -> list[str]:
    """What each token is to a noun phrase; the last entry stands for the end of the prompt."""
    kinds = [_kind(words, index) for index in range(len(words))] + [_END]
    for index in reversed(range(len(words))):  # backwards: what a word is depends on what follows it
        if kinds[index] == _WORD and _ends_phrase(words, kinds, index):
            kinds[index] = _END
    predicate = False
    for index, word in enumerate(words):
        if word in COPULAS:
            predicate = words[max(index - 1, 0)] not in ("there", "here")
        elif kinds[index] != _WORD:
            predicate = predicate and word in ADVERBS
        elif predicate and _is_plural(words, kinds, index):
            predicate = False
        elif predicate:
            kinds[index] = _END
            predicate = not is_participle(word)  # "is pushing red carts": the rest is an object
    verb = _swallowed_verb(words, kinds)
    if verb is not None:
        kinds[verb] = _END
    return kinds


def _kind(words: list[str], index: int) -> str:
    word, before, after = words[index], words[max(index - 1, 0)], words[index + 1] if index + 1 < len(words) else "."
    if word == "her" and (after in _ENDS or not after[0].isalnum()):  # not "her cat"
        return _PRONOUN
    if word in DETERMINERS:
        return _DETERMINER
    if word in PRONOUNS:
        return _PRONOUN
    if word == ",":
        return _COMMA
    if (
        word == "can"
        and before not in PRONOUNS
        and (before in CANS or after in _ENDS - {"not", "be", "have"} or after == ".")
    ):
        return _WORD  # "a can of soup"
    if word in PREPOSITIONS and before in ("a", "an", "the", "its", "their"):
        return _WORD  # "the past", "an off white wall"
    return _WORD if word[0].isalnum() and word not in _ENDS else _END


def _ends_phrase(words: list[str], kinds: list[str], index: int) -> bool:
    """Whether a word of an open class, with those behind it judged, is a verb or an adverb where it stands."""
    word, after = words[index], kinds[index + 1]
    following = words[index + 1] if index + 1 < len(words) else "."
    previous, before = (words[index - 1], kinds[index - 1]) if index else ("", _END)
    if before == _DETERMINER:  # "a watch", "the painting", "the left"
        return False
    if after == _DETERMINER or previous in SUBJECTS:
        return True
    if after == _PRONOUN and (following not in SUBJECTS or word.endswith("ing")):  # "fascinated him"
        return True
    if word in VERBS:
        return following not in ("of", "iron")  # "the defining features of", "cast iron"
    if word in PASTS:
        described = previous in COLOURS or _is_pure_adjective(previous)  # "a red rose on"
        return before == _WORD and following in PREPOSITIONS and not described
    if word.endswith("ly") and word not in NOUNS_IN_LY:
        return after != _WORD
    if word in ("left", "right"):
        return before == _WORD and after == _END
    if not is_participle(word):
        return False
    if word.endswith("ing"):
        if previous in ("for", "before", "after", "without", "while", "when") and after == _WORD:
            return True  # "for serving dinner"
        if _is_pure_adjective(previous):  # "a long meeting"
            return False
    return after == _END if index + 1 < len(words) else before == _WORD


def _swallowed_verb(words: list[str], kinds: list[str]) -> int | None:
    """Where a sentence in which no verb was found has one.

    That is its first word in -ed between two words of a phrase ("The shop stocked lamps."), or else the last of the
    first three words or more before a preposition, a determiner aside ("and fluffy blanket wait for").
    """
    if not words or words[0] not in DETERMINERS - {"a", "an"} or words[-1] != ".":  # "A room with tiled walls."
        return None
    for word, kind in zip(words, kinds, strict=False):
        if word in AUXILIARIES or (kind == _END and word not in _ENDS and word.isalpha() and not word.endswith("ly")):
            return None
    for index in range(1, len(words)):
        word, before = words[index], words[index - 1]
        described = before.endswith("ly") or before in COLOURS or _is_pure_adjective(before)
        inside = kinds[index - 1 : index + 2] == [_WORD] * 3
        if word.endswith("ed") and is_participle(word) and inside and not described:
            return index
    for index in range(2, len(words) - 1):
        if kinds[index - 2 : index + 1] == [_WORD] * 3 and words[index + 1] in PREPOSITIONS - {"of"}:
            return index
    return None


def _is_plural(words: list[str], kinds: list[str], start: int) -> bool:
    """Whether the words from `start` to the end of the phrase are several, not a participle first, a plural last."""
    end = next(index for index in range(start, len(kinds)) if kinds[index] != _WORD)
    last = words[end - 1]
    return end > start + 1 and not is_participle(words[start]) and last.endswith("s") and not last.endswith("ss")


def is_participle(word: str) -> bool:
    """Whether a word, lower case, looks like one in -ed or -ing."""
    return (
        len(word) > 4
        and word.endswith(("ed", "ing"))
        and not word.endswith("eed")
        and word not in NOUNS_IN_ING
        and "-" not in word
    )


def _is_pure_adjective(word: str) -> bool:
    return word in PURE_ADJECTIVES or _ADJECTIVAL.fullmatch(word) is not None


def _joins_at_comma(kinds: list[str], start: int, comma: int) -> bool:
    """Whether the comma lies in a list as "the soft, warm, fluffy pillow": single words, then at least two."""
    inside = kinds[start + 1 : comma]
    if kinds[start] != _DETERMINER or kinds[comma] != _COMMA or not inside or set(inside[1::2]) - {_COMMA}:
        return False
    index = comma + 1
    while kinds[index : index + 2] == [_WORD, _COMMA]:
        index += 2
    return kinds[index : index + 2] == [_WORD, _WORD]


def _joins_at_and(words: list[str], kinds: list[str], start: int, index: int) -> bool:
    """Whether the word at `index` is the "and" of "a black and white cat" or of "a big and heavy box".

    Not that of "a red orange and brown bread": behind another colour, an orange is a fruit.
    """
    if words[index : index + 1] != ["and"] or kinds[index + 1 : index + 3] != [_WORD, _WORD]:
        return False
    first, second, ahead = words[index - 1], words[index + 1], words[start : index - 1]
    if first in COLOURS and second in COLOURS:
        return first not in ("orange", "violet") or not COLOURS.intersection(ahead)
    adjectives = all(map(_is_pure_adjective, (first, second)))
    return adjectives and all(word in DETERMINERS or word in COLOURS or _is_pure_adjective(word) for word in ahead)
