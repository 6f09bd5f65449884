"""The user study of the paper's figure 7: `vote.html`, pairs of images to vote on without knowing who drew them.

A pair is two models' images of one prompt and one noise. Which model stands on which side is drawn by lot and written
into a key beside the page, `vote_key-<study>.json`; neither a name nor a file name is in the page. A voter's browser
keeps the votes and saves them as a file, which `sharpening/evaluation/votes.py` counts with the key.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sharpening.files import write_aside
from sharpening.pages import EMBED_LIMIT, data_uri, write_page

PAGE, TEMPLATE = "vote.html", Path(__file__).parent / "templates" / "vote.html.jinja"


class Pair(NamedTuple):
    """One question: image number `image` as two models drew it."""

    image: int
    left: str
    right: str


def key_name(study: str) -> str:
    """The file that tells who stands on which side."""
    return f"vote_key-{study}.json"


def deal(models: Sequence[str], num_images: int, num_pairs: int, seed: int) -> list[Pair]:
    """Pairs in the order of the vote: every two models get the same number of them (or one more), on images drawn
    without replacement. Sides and order are by lot; one seed gives one dealing."""
    rng = np.random.default_rng(seed)
    matches = list(itertools.combinations(models, 2))
    drawn = [rng.permutation(num_images) for _ in matches]
    pairs = []
    for index in range(num_pairs):
        turn, match = divmod(index, len(matches))
        left, right = (matches[match][side] for side in rng.permutation(2))
        pairs.append(Pair(int(drawn[match][turn]), left, right))
    return [pairs[index] for index in rng.permutation(num_pairs)]


def write_study(
    folder: Path, prompts: Sequence[str], images: Mapping[str, Sequence[Path]], num_pairs: int, seed: int
) -> Path:
    """Write `vote.html` and its key into `folder`; returns the key's path.

    The images lie in the page: as PNG up to 16 MiB in all, above that as JPEG of quality 95, whoever drew them. The
    study's id follows from its pairs and images: written again it is the same study, and its votes still count.

    Args:
        prompts: of the N images.
        images: PNG files of each model, N each.
        num_pairs: at most N for each two models.
        seed: of the lots.
    """
    pairs = deal(list(images), len(prompts), num_pairs, seed)
    files = [images[model][pair.image] for pair in pairs for model in (pair.left, pair.right)]
    contents = [file.read_bytes() for file in files]
    key = {"models": list(images), "pairs": [{**pair._asdict(), "prompt": prompts[pair.image]} for pair in pairs]}
    study = hashlib.sha256(json.dumps(key).encode() + b"".join(contents)).hexdigest()[:16]
    path = folder / key_name(study)
    with write_aside(path) as aside:
        aside.write_text(json.dumps({"study": study, **key}, indent=2), encoding="utf-8")
    addresses = _addresses(contents)
    shown = [
        {"prompt": prompts[pair.image], "left": left, "right": right}
        for pair, left, right in zip(pairs, addresses[::2], addresses[1::2], strict=True)
    ]
    write_page(folder / PAGE, TEMPLATE, data={"study": study, "pairs": shown})
    return path


def _addresses(contents: Sequence[bytes]) -> list[str]:
    if sum(map(len, contents)) <= EMBED_LIMIT:
        return [data_uri(content) for content in contents]
    encoded = []
    for content in contents:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(content)).convert("RGB").save(buffer, format="JPEG", quality=95)
        encoded.append(data_uri(buffer.getvalue(), "jpeg"))
    return encoded
