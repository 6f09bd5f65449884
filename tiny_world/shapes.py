"""The captioned-shapes world: prompts, drawings and a programmatic reward, with nothing to download.

A caption is a sentence such as "a red circle on a white background": 6 colours x 3 shapes x 3 backgrounds = 54.
`draw` makes an image of a caption and `score` judges how well an image follows one. Nine captions are held out: they
never occur in a fine-tuning set, so that they can judge one. The study chooses its settings by these, so it judges by
nine others, which it does not train on either. Light imports only (numpy, PIL).
"""

import re

import numpy as np
from PIL import Image, ImageDraw

# Far apart in RGB and far from every background, so that a blurred copy still has an unambiguous name.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "green": (30, 165, 55),
    "blue": (35, 60, 225),
    "yellow": (245, 220, 30),
    "purple": (155, 35, 190),
    "cyan": (40, 205, 230),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}

# Every shape-background pair once; every colour once or twice, and never twice with one shape or one background.
HELD_OUT: tuple[str, ...] = (
    "a red circle on a white background",
    "a green circle on a gray background",
    "a blue circle on a black background",
    "a yellow square on a white background",
    "a purple square on a gray background",
    "a cyan square on a black background",
    "a green triangle on a white background",
    "a blue triangle on a gray background",
    "a red triangle on a black background",
)

# The same again with none of those.
JUDGED: tuple[str, ...] = (
    "a purple circle on a white background",
    "a cyan circle on a gray background",
    "a yellow circle on a black background",
    "a red square on a white background",
    "a blue square on a gray background",
    "a green square on a black background",
    "a cyan triangle on a white background",
    "a yellow triangle on a gray background",
    "a purple triangle on a black background",
)

_GRAMMAR = re.compile(rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) on a ({'|'.join(BACKGROUNDS)}) background")
_SQRT3 = 3.0**0.5
# Side of each shape in units of sqrt(area): circle radius, square half side, triangle circumradius.
_EXTENT = {"circle": np.pi**-0.5, "square": 0.5, "triangle": (4.0 / (3.0 * _SQRT3)) ** 0.5}


def caption_of(colour: str, shape: str, background: str) -> str:
    """The sentence that names the three attributes."""
    return f"a {colour} {shape} on a {background} background"


def parse(caption: str) -> tuple[str, str, str]:
    """`(colour, shape, background)` of a caption; ValueError for a sentence outside of the grammar."""
    match = _GRAMMAR.fullmatch(caption)
    if match is None:
        raise ValueError(
            f"The caption {caption!r} is not one of the shapes world's; "
            f"write 'a <colour> <shape> on a <background> background' with a colour of {', '.join(COLOURS)}, "
            f"a shape of {', '.join(SHAPES)} and a background of {', '.join(BACKGROUNDS)}."
        )
    colour, shape, background = match.groups()
    return colour, shape, background


def all_captions() -> list[str]:
    """The 54 captions, in a fixed order."""
    return [caption_of(c, s, b) for c in COLOURS for s in SHAPES for b in BACKGROUNDS]


def held_out_captions() -> list[str]:
    """The 9 captions that no fine-tuning set contains."""
    return list(HELD_OUT)


def training_captions() -> list[str]:
    """The 45 captions that are not held out, in a fixed order."""
    return [caption for caption in all_captions() if caption not in HELD_OUT]


def judged_captions() -> list[str]:
    """The 9 captions, none of them held out, that table 1 of the study judges by."""
    return list(JUDGED)


def study_captions() -> list[str]:
    """The 36 captions that are neither held out nor judged by, in a fixed order: table 1 trains on these."""
    return [caption for caption in training_captions() if caption not in JUDGED]


def wrong_caption(caption: str, rng: np.random.Generator) -> str:
    """A caption that differs in colour, in shape or in both (a third each); the background stays."""
    colour, shape, background = parse(caption)
    change = rng.integers(3)
    if change != 1:
        colour = str(rng.choice([c for c in COLOURS if c != colour]))
    if change != 0:
        shape = str(rng.choice([s for s in SHAPES if s != shape]))
    return caption_of(colour, shape, background)


def draw(caption: str, rng: np.random.Generator, size: int = 32) -> Image.Image:
    """An RGB image of the caption, `size` pixels square, with its figure at a random place and scale.

    The figure covers 12% to 30% of the image and keeps a sixteenth of the width clear of the border, which is where
    `score` looks for the background.
    """
    colour, shape, background = parse(caption)
    factor = 8  # drawn this much larger and averaged down: anti-aliased edges, sub-pixel positions
    pixels = size * factor
    # Scale by area, not by width: the amount of colour then says nothing about which shape it is.
    root_area = pixels * np.sqrt(rng.uniform(0.12, 0.30))
    extent = root_area * _EXTENT[shape]
    half_width = extent * (_SQRT3 / 2 if shape == "triangle" else 1.0)
    bottom = extent / 2 if shape == "triangle" else extent  # from the centroid down; up it is `extent` for all three
    margin = pixels / 16
    x = rng.uniform(margin + half_width, pixels - margin - half_width)
    y = rng.uniform(margin + extent, pixels - margin - bottom)
    image = Image.new("RGB", (pixels, pixels), BACKGROUNDS[background])
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - extent, y - extent, x + extent, y + extent), fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle((x - extent, y - extent, x + extent, y + extent), fill=COLOURS[colour])
    else:
        corners = [(x, y - extent), (x - half_width, y + bottom), (x + half_width, y + bottom)]
        pen.polygon(corners, fill=COLOURS[colour])
    return image.reduce(factor)


def _table(colours: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """Named colours as an array `(number of names, 3)` in [0, 1]."""
    return np.array(list(colours.values()), dtype=np.float32) / 255.0


def _named(pixels: np.ndarray, names: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How far each pixel `(B, N, 3)` has the wanted name, `(B, N)` in [0, 1].

    0 unless the wanted colour is the nearest of all names; then 1 up to a distance of 0.08, falling off beyond. The
    flat top keeps a decoder's slight tint from mattering; the fall-off keeps noise, which is near nothing, at zero.
    """
    distance = np.linalg.norm(pixels[:, :, None, :] - names, axis=-1)  # (B, N, names)
    own = np.take_along_axis(distance, wanted[:, None, None], axis=2)[:, :, 0]  # (B, N)
    closeness = np.exp(-((np.maximum(own - 0.08, 0.0) / 0.2) ** 2))
    return np.where(distance.argmin(axis=2) == wanted[:, None], closeness, 0.0)


def _templates(mask: np.ndarray) -> np.ndarray:
    """Soft masks `(B, 3, H, W)` of the three shapes with the centroid and the area of `mask` `(B, H, W)`."""
    _, height, width = mask.shape
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    area = np.maximum(mask.sum(axis=(1, 2)), 1e-6)[:, None, None]
    y = rows - (mask * rows).sum(axis=(1, 2))[:, None, None] / area  # (B, H, W), from the centroid
    x = columns - (mask * columns).sum(axis=(1, 2))[:, None, None] / area
    side = np.sqrt(area)
    outside = {  # distance beyond the shape's edge, in pixels: half a pixel either way is the anti-aliased edge
        "circle": np.hypot(x, y) - side * _EXTENT["circle"],
        "square": np.maximum(abs(x), abs(y)) - side * _EXTENT["square"],
        "triangle": np.maximum(y, (abs(x) * _SQRT3 - y) / 2) - side * _EXTENT["triangle"] / 2,
    }
    return np.stack([np.clip(0.5 - outside[shape], 0.0, 1.0) for shape in SHAPES], axis=1)


def score_parts(images: np.ndarray, captions: list[str]) -> dict[str, np.ndarray]:
    """Soft scores for "colour", "shape" and "background", each `(B,)` float32 in [0, 1]; see `score`."""
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(captions):
        raise ValueError(
            f"Expected images (B, H, W, 3) with one caption each, got {images.shape} and {len(captions)} captions."
        )
    wanted = [parse(caption) for caption in captions]
    if not captions:
        return {part: np.zeros(0, dtype=np.float32) for part in ("colour", "shape", "background")}
    want_colour = np.array([list(COLOURS).index(c) for c, _, _ in wanted])
    want_shape = np.array([SHAPES.index(s) for _, s, _ in wanted])
    want_background = np.array([list(BACKGROUNDS).index(b) for _, _, b in wanted])
    batch, height, width, _ = images.shape

    # Background: what the border shows.
    ring = max(1, min(height, width) // 32)
    on_border = np.ones((height, width), dtype=bool)
    on_border[ring:-ring, ring:-ring] = False
    border = images[:, on_border]  # (B, N, 3)
    background = _named(border, _table(BACKGROUNDS), want_background).mean(axis=1)

    # Figure: what differs from the border. Its colour is read where the difference is strong, clear of blurred edges.
    ground = np.median(border, axis=1)[:, None, :]  # (B, 1, 3)
    flat = images.reshape(batch, -1, 3)
    difference = np.linalg.norm(flat - ground, axis=-1)  # (B, H * W)
    strongest = np.quantile(difference, 0.96, axis=1)[:, None]
    core = difference >= 0.8 * np.maximum(strongest, 0.05)
    count = np.maximum(core.sum(axis=1), 1)
    names = np.concatenate([_table(COLOURS), _table(BACKGROUNDS)])  # a white figure on black has none of the colours
    colour = (_named(flat, names, want_colour) * core).sum(axis=1) / count

    # Shape: overlap with a circle, a square and a triangle of the figure's own area, placed at its centroid.
    paint = (flat * core[..., None]).sum(axis=1) / count[:, None]
    direction = paint[:, None, :] - ground
    length = np.maximum((direction**2).sum(axis=-1), 1e-6)
    mask = np.clip(((flat - ground) * direction).sum(axis=-1) / length, 0.0, 1.0)
    mask = np.where(mask < 0.1, 0.0, mask).reshape(batch, height, width)  # faint tint far from the figure is no figure
    templates = _templates(mask)
    overlap = np.minimum(templates, mask[:, None]).sum(axis=(2, 3))
    union = np.maximum(np.maximum(templates, mask[:, None]).sum(axis=(2, 3)), 1e-6)
    iou = overlap / union  # (B, 3)
    # Shapes of equal area overlap by 0.6 to 0.85, so being the best match matters more than the overlap itself.
    likely = np.exp((iou - iou.max(axis=1, keepdims=True)) / 0.02)
    likely /= likely.sum(axis=1, keepdims=True)
    quality = np.clip((iou - 0.65) / 0.2, 0.0, 1.0)
    shape = np.take_along_axis(likely * quality, want_shape[:, None], axis=1)[:, 0]

    # An empty image has no figure to be on a background: it earns nothing, rather than a third.
    area = mask.mean(axis=(1, 2))
    contrast = np.sqrt(length[:, 0])
    present = np.clip((contrast - 0.1) / 0.15, 0, 1) * np.clip((area - 0.02) / 0.03, 0, 1) * (area < 0.7)
    parts = {"colour": colour, "shape": shape, "background": background}
    return {part: np.clip(value * present, 0, 1).astype(np.float32) for part, value in parts.items()}


def score(images: np.ndarray, captions: list[str]) -> np.ndarray:
    """How well each image follows its caption: the mean of right colour, right shape and right background.

    `images` is `(B, H, W, 3)` in [0, 1] at any resolution, `captions` are B sentences of the grammar (ValueError
    otherwise). Returns `(B,)` float32 in [0, 1]: a clean drawing is near 1, one with k wrong attributes near
    (3 - k) / 3, a blank or noisy image near 0. The parts are soft, so a blurred figure earns less than a clean one.
    """
    parts = score_parts(images, captions)
    return np.mean(list(parts.values()), axis=0, dtype=np.float32)
