"""Seeded weights, images, prompts and a vocabulary on which ImageReward implementations are compared.

Plain numpy, so that the environment of the original package and ours can both import it.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

SIZES = ((224, 224), (256, 256), (512, 512), (300, 460), (460, 300), (64, 32), (225, 223), (1024, 576))  # (H, W)

PROMPTS = (
    "a cat",
    "a photo of a red car on the street at night",
    "",
    "A PAINTING OF AN OLD CASTLE ABOVE THE SEA",
    "café façade, naïve décor, jalapeño und Straße",
    'wow!!! a dog... (running), "fast" & far-away; [sketch] #art @home 100% / 50$',
    "an astronaut riding a horse 🚀🐎 on the moon 月",
    "3 birds, 12 trees and 2048 flowers in 1999",
    "a beautiful landscape with a river and green mountains under a blue sky, soft light of the morning sun, "
    "white clouds, small birds over the water, an old house between tall trees, a road with two people and a dog, "
    "highly detailed digital painting, sharp focus, trending on artstation, 8 k, cinematic",
    "zxqvjk blorptastic hyperfrobnication",
    "a small red cube left of a large blue sphere",
    "a large blue cube left of a small red sphere",
    "  tabs\tand\nnew lines   and  many    spaces  ",
    "cafe\u0301 in decomposed accents, na\u00a0\u200bïve ﬁsh, \uff26\uff35\uff2c\uff2c width",
    "w" * 120 + " a word too long for any vocabulary",
    "portrait of a smiling woman, film grain, 35mm, golden hour, by the window, warm colors, close-up, bokeh, calm",
)

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[]^_"
_WORDS = (
    "a an and the of on at in with under over above between left by for to photo painting portrait sketch art "
    "digital detailed cat dog bird birds horse fish astronaut moon sun sky cloud clouds car street road house castle "
    "old small large tall soft warm new many red green blue white golden night morning light water river sea mountain "
    "tree trees flower flowers people woman window film cube sphere river landscape beautiful running fast home word "
    "spaces lines cafe width two focus sharp hour close up calm long any"
)
_ENDINGS = "##s ##ed ##ing ##er ##ly ##ation ##tain ##tains ##scape ##ful ##mm ##ve ##de ##un ##or ##al"


def vocabulary() -> list[str]:
    """The tokens in the order of their ids; words that it lacks break into pieces, signs that it lacks are `[UNK]`."""
    characters = [*_LETTERS, *_DIGITS]
    tokens = [
        *_SPECIAL,
        *_PUNCTUATION,
        "月",
        *characters,
        *(f"##{c}" for c in characters),
        *_WORDS.split(),
        *_ENDINGS.split(),
    ]
    return list(dict.fromkeys(tokens))


def write_vocab(path: str | Path) -> None:
    """Writes the vocabulary as the `vocab.txt` of a BERT tokenizer; `[PAD]` has id 0."""
    Path(path).write_text("".join(f"{token}\n" for token in vocabulary()), encoding="utf-8")


def seeded_state_dict(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Random float32 weights of these shapes, each seeded by its name alone.

    The scales keep signals at about unit size through every layer, and both image and prompt visible in the scores.
    """
    return {name: _seeded_weight(name, tuple(shape)) for name, shape in shapes.items()}


def seeded_images(count: int) -> list[np.ndarray]:
    """Smooth coloured noise as uint8 arrays (H, W, 3), of each of `SIZES` in turn."""
    return [_seeded_image(index, *SIZES[index % len(SIZES)]) for index in range(count)]


def _seeded_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = np.random.default_rng([zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
    if name.endswith("bias"):
        return noise * np.float32(0.1)
    if len(shape) == 1:  # the weights of normalizations
        return 1 + noise * np.float32(0.1)
    if name.endswith(("cls_token", "pos_embed")) or "embeddings." in name:
        return noise * np.float32(0.5)
    return noise * np.float32(_gain(name) / math.sqrt(math.prod(shape[1:])))


def _gain(name: str) -> float:
    if "crossattention.output.dense" in name:
        return 0.4  # at 1, what is said of the image drowns the prompt within twelve layers
    if "self.query" in name or "self.key" in name:
        return 2.0  # attention that is far from uniform
    return 1.0


def _seeded_image(index: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng([7, index])
    image = np.zeros((height, width, 3)) + rng.uniform(60, 195, 3)
    for cells, strength in ((3, 40), (8, 25), (24, 12)):
        grid = rng.standard_normal((cells, cells, 3)) * strength
        image += np.einsum("hi,ijc,wj->hwc", _hats(height, cells), grid, _hats(width, cells), optimize=True)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _hats(length: int, cells: int) -> np.ndarray:
    """Weights (length, cells) of a linear interpolation."""
    positions = np.linspace(0, cells - 1, length)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(cells)))
