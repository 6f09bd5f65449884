"""The world of signs: prompts, drawings and a check by templates, with nothing to download.

A caption is a sentence such as "a white sign with the number forty four in red": 32 numbers from 20 to 99, which the
sign shows in digits, x 2 inks x 2 colours of the sign = 128; with the 640 captions of 80 numbers and 4 inks the model
learned to draw digits, and hardly which. `draw` makes an image of a caption, in one of four fonts. What a sign says is
judged by a network that reads (`tiny_world/read_number.py`); `template_match` judges it without one. Numbers are held
out whole: eight by which settings may be chosen and eight by which models are judged, so that a fine-tuning set has
every first digit, ink and sign, but none of those numbers; the base model has seen all. Light imports only (numpy and
PIL, and matplotlib's fonts where something is drawn).
"""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# A word for each digit in each place: a text encoder with random weights tells words apart, and hardly their order.
TENS: tuple[str, ...] = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ONES: tuple[str, ...] = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT, JUDGED, STUDY = (5,), (0,), (2, 8)  # last digits of the sum of a number's digits
NUMBERS: tuple[str, ...] = tuple(
    str(number) for number in range(20, 100) if (number // 10 + number) % 10 in (*HELD_OUT, *JUDGED, *STUDY)
)
# Each ink is told from the other, and from each sign, by more than half of the width of RGB.
INKS: dict[str, tuple[int, int, int]] = {"red": (225, 30, 35), "blue": (35, 60, 225)}
SIGNS: dict[str, tuple[int, int, int]] = {"white": (255, 255, 255), "yellow": (250, 225, 60)}
FONTS: tuple[str, ...] = (  # as matplotlib ships them
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif-Bold",
    "DejaVuSansMono-Bold",
)
HEIGHTS = (0.36, 0.5)  # of the digits, as a share of the image's
WIDEST = 0.84  # share of the image's width that a number may take; it is drawn smaller where it would take more
JITTER = 0.08  # how far a number may lie from the middle, either way, as a share of the image's width

_GRAMMAR = re.compile(
    rf"a ({'|'.join(SIGNS)}) sign with the number ({'|'.join(TENS)})(?: ({'|'.join(ONES[1:])}))? in ({'|'.join(INKS)})"
)


def caption_of(sign: str, number: str, ink: str) -> str:
    """The sentence that names the three attributes, `number` being two digits such as "47"."""
    words = f"{TENS[int(number[0]) - 2]} {ONES[int(number[1])]}".rstrip()
    return f"a {sign} sign with the number {words} in {ink}"


def parse(caption: str) -> tuple[str, str, str]:
    """`(sign, number, ink)` of a caption, the number in digits; ValueError for a sentence outside of the grammar."""
    match = _GRAMMAR.fullmatch(caption)
    if match is None:
        raise ValueError(
            f"The caption {caption!r} is not one of the signs world's; "
            "write 'a <colour> sign with the number <twenty to ninety nine> in <ink>' "
            f"with a colour of {', '.join(SIGNS)} and an ink of {', '.join(INKS)}."
        )
    sign, tens, ones, ink = match.groups()
    return sign, f"{TENS.index(tens) + 2}{ONES.index(ones or '')}", ink


def _captions(*last_digits: int) -> list[str]:
    """Captions of the numbers whose digits' sum ends in one of `last_digits`, in a fixed order."""
    numbers = [number for number in NUMBERS if (int(number[0]) + int(number[1])) % 10 in last_digits]
    return [caption_of(s, n, i) for n in numbers for s in SIGNS for i in INKS]


def all_captions() -> list[str]:
    """The 128 captions, in a fixed order."""
    return _captions(*HELD_OUT, *JUDGED, *STUDY)


def held_out_captions() -> list[str]:
    """The 32 captions by which settings may be chosen: of 23, 32, 41, 50, 69 and so on, each first digit once."""
    return _captions(*HELD_OUT)


def judged_captions() -> list[str]:
    """The 32 captions by which models are judged: of 28, 37, 46 and so on to 91."""
    return _captions(*JUDGED)


def study_captions() -> list[str]:
    """The 64 captions that are neither held out nor judged by, in a fixed order: the study trains on these."""
    return _captions(*STUDY)


def training_captions() -> list[str]:
    """The 96 captions that are not held out, in a fixed order."""
    return _captions(*JUDGED, *STUDY)


def wrong_caption(caption: str, rng: np.random.Generator) -> str:
    """A caption that differs in number, in ink or in both (a third each); the sign stays."""
    sign, number, ink = parse(caption)
    change = rng.integers(3)
    if change != 1:
        number = str(rng.choice([n for n in NUMBERS if n != number]))
    if change != 0:
        ink = str(rng.choice([i for i in INKS if i != ink]))
    return caption_of(sign, number, ink)


@lru_cache(maxsize=4096)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def _fitting(number: str, font: str, height: float, width: float) -> ImageFont.FreeTypeFont:
    """The font in which the digits are `height` pixels high and the number at most `width` pixels wide."""
    left, top, right, bottom = _font(font, 100).getbbox(number)
    return _font(font, int(100 * min(height / (bottom - top), width / (right - left))))


def draw(caption: str, rng: np.random.Generator, size: int = 32) -> Image.Image:
    """An RGB image of the caption, `size` pixels square, with its number in a random font, height and place.

    The number keeps a sixteenth of the width clear of the border, which is where the sign's colour is looked for.
    """
    sign, number, ink = parse(caption)
    factor = 4  # drawn this much larger and averaged down: sub-pixel positions
    pixels = size * factor
    font = _fitting(number, FONTS[rng.integers(len(FONTS))], pixels * rng.uniform(*HEIGHTS), pixels * WIDEST)
    left, top, right, bottom = font.getbbox(number)
    # Never nearer to the border than a sixteenth of the width.
    x, y = (
        (pixels - side) / 2 + rng.uniform(-1, 1) * min(pixels * JITTER, pixels * 7 / 16 - side / 2)
        for side in (right - left, bottom - top)
    )
    image = Image.new("RGB", (pixels, pixels), SIGNS[sign])
    ImageDraw.Draw(image).text((x - left, y - top), number, INKS[ink], font)
    return image.reduce(factor)


@lru_cache(maxsize=256)
def _templates(number: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A number in each font and in several heights, in the upper left corner of an image `size` pixels square.

    Returns the masks of its ink `(T, size, size)` in [0, 1]; their spectra `(T, size, size // 2 + 1)`, of zero mean
    and unit norm; and where the corner may be put `(T, size, size)`, so that the number stays inside of the image.
    """
    masks, places = [], []
    for font in FONTS:
        for height in np.linspace(*HEIGHTS, 6):
            fitting = _fitting(number, font, 4 * size * height, 4 * size * WIDEST)
            left, top, right, bottom = fitting.getbbox(number)
            image = Image.new("L", (4 * size, 4 * size))
            ImageDraw.Draw(image).text((-left, -top), number, 255, fitting)
            masks.append(np.asarray(image.reduce(4), dtype=np.float32) / 255)
            place = np.zeros((size, size), dtype=bool)
            place[: size - (bottom - top) // 4, : size - (right - left) // 4] = True
            places.append(place)
    masks, places = np.stack(masks), np.stack(places)
    centred = masks - masks.mean(axis=(1, 2), keepdims=True)
    centred /= np.linalg.norm(centred, axis=(1, 2), keepdims=True)
    return masks, np.fft.rfft2(centred), places


def _best_match(ink: np.ndarray, number: str) -> tuple[float, np.ndarray]:
    """The highest correlation of `ink` (H, H), of zero mean and unit norm, with a template, and that template."""
    masks, spectra, places = _templates(number, len(ink))
    correlation = np.fft.irfft2(np.fft.rfft2(ink) * spectra.conj(), s=ink.shape)  # (T, H, H), over all places
    correlation = np.where(places, correlation, -1)
    template, *corner = np.unravel_index(correlation.argmax(), correlation.shape)
    return float(correlation.max()), np.roll(masks[template], corner, (0, 1))


def _named(pixel: np.ndarray, wanted: str) -> float:
    """How far a colour (3,) in [0, 1] has the wanted name, in [0, 1].

    0 unless that is the nearest of all names, else 1 up to a distance of 0.15, falling off beyond.
    """
    names = {**INKS, **SIGNS}
    distance = {name: float(np.linalg.norm(pixel - np.array(rgb) / 255)) for name, rgb in names.items()}
    nearest = min(distance, key=distance.__getitem__)
    return float(np.exp(-((max(distance[wanted] - 0.15, 0) / 0.2) ** 2))) if nearest == wanted else 0.0


def template_match(images: np.ndarray, captions: list[str]) -> np.ndarray:
    """How well each image follows its caption, by drawn templates.

    `images` is `(B, H, H, 3)` in [0, 1], `captions` are B sentences of the grammar (ValueError otherwise). Returns
    `(B,)` float32 in [0, 1], the product of how well the image correlates with the best template of its number (0 at a
    correlation of 0.6, 1 from 0.85 on) and the mean of three: that no number that differs in one digit correlates
    better, that the ink is right where that template has ink, and that the sign is right on the border. A drawing
    is near 1, one in another ink or on another sign near 2/3, one with another digit near 0.4, with two near 0.1, a
    blank or noisy image near 0. It shares the names of colours and the border with the reward that reads
    (`tiny_world/read_number.py`), but not how it finds the number.
    """
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[-1] != 3 or len(images) != len(captions):
        raise ValueError(
            f"Expected square images (B, H, H, 3) with one caption each, got {images.shape} and {len(captions)} "
            "captions."
        )
    scores = np.zeros(len(images), dtype=np.float32)
    ring = max(1, images.shape[1] // 32)
    on_border = np.ones(images.shape[1:3], dtype=bool)
    on_border[ring:-ring, ring:-ring] = False
    for row, (image, (sign, number, ink)) in enumerate(zip(images, map(parse, captions), strict=True)):
        ground = np.median(image[on_border], axis=0)
        difference = np.linalg.norm(image - ground, axis=-1)  # (H, H)
        centred = difference - difference.mean()
        norm = np.linalg.norm(centred)
        if norm < 0.02 * len(image):  # nothing is on the sign
            continue
        own, template = _best_match(centred / norm, number)
        similar = {number[0] + digit for digit in "0123456789"} | {digit + number[1] for digit in "0123456789"}
        other = max(_best_match(centred / norm, n)[0] for n in similar - {number})
        quality = np.clip((own - 0.6) / 0.25, 0, 1)
        clearer = 1 / (1 + np.exp((other - own) / 0.01))
        on_ink = template > 0.7 * template.max()
        colour = np.median(image[on_ink], axis=0)
        scores[row] = quality * (clearer + _named(colour, ink) + _named(ground, sign)) / 3
    return scores
