"""Text rendering: how much of the text that the prompt puts in quotes is read in the image."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from typing import TYPE_CHECKING

from sharpening.errors import require

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PACKAGES = ("rapidocr", "onnxruntime")
MAX_RATIO = 8  # of the sides of an image that is read; a longer one gets a white margin
# Double quotes of several languages and those of Japanese; and single ones, which have no letter beside them outside
# ("it's", "the dogs' bowl").
_DOUBLE = re.compile(  # behind a digit it is a sign of inches
    r'(?<!\d)"([^"]*)"|[“„”]([^“„”]*)[“”]|«([^«»]*)»|»([^«»]*)«|「([^「」]*)」|『([^『』]*)』'
)
_STRAIGHT = str.maketrans("\u2018\u2019“”„", '\'\'"""')
_SINGLE = re.compile(r"(?<!\w)['\u2018]((?:[^'\u2018\u2019]|(?<=\w)['\u2019](?=\w))*)['\u2019](?!\w)")


class OCRReward:
    """How much of the text that the prompt puts in quotes is read in the image, by RapidOCR on the CPU.

    Range: [0, 1]: 1 - edits / length, at least 0, where edits is the Levenshtein distance between the text read and
    the text in quotes, and length that of the latter; 1 where all of it is read, whatever else is. Case, blanks and
    line breaks do not count. Several texts in quotes are one, in their order. Source: the text-rendering task of
    Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), which reads with PaddleOCR; RapidOCR ships models of that family in
    its package, so nothing is downloaded. They know Latin letters, some accents among them, and by their table of
    characters Chinese and Japanese; Greek is read as the Latin letters it looks like, Cyrillic and Korean not at all.

    A prompt without a text in "double", “typographic”, 'single' or other quotes has no score: `--reward_failure`
    decides what follows. An image scores the same alone and in any batch, as each is read alone.

    Raises:
        UserError: naming the package, if it is not installed.
    """

    def __init__(self) -> None:
        check_installed()
        import torch
        from rapidocr import RapidOCR

        threads = torch.get_num_threads()  # onnxruntime would take every core, in each process of a run
        self.reader = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.text_score": 0.0,  # what is read badly counts for what it is
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        import torch

        from sharpening.rewards.calling import RowsFailed
        from sharpening.rewards.preprocessing import to_uint8

        targets = [quoted(prompt) for prompt in prompts]
        scores = torch.full((len(prompts),), torch.nan)
        for row, (image, target) in enumerate(zip(to_uint8(images), targets, strict=True)):
            if target:
                scores[row] = similarity(self.read(image), target)
        reasons = {row: "its prompt has no text in quotes" for row, target in enumerate(targets) if not target}
        if reasons:
            raise RowsFailed((scores, {}), reasons)
        return scores

    def read(self, image: np.ndarray) -> str:
        """The text in an image `(H, W, 3)` uint8, line after line."""
        import numpy as np

        # The reader enlarges an image by its shorter side: a strip would become huge.
        short = max(image.shape[:2]) // MAX_RATIO
        pad = [(0, max(0, short - side)) for side in image.shape[:2]]
        image = np.pad(image, (*pad, (0, 0)), constant_values=255)
        lines = self.reader(image[:, :, ::-1].copy()).txts  # which takes BGR, as OpenCV does
        return "\n".join(lines or ())


def check_installed(reward: str = "ocr") -> None:
    """Refuse to go on without RapidOCR, which the named reward reads with.

    Raises:
        UserError: naming what is missing and how to install it.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    remedy = "install it with pip install -e '.[ocr]'"
    require(not missing, f"--reward_model {reward} needs {' and '.join(missing)}; {remedy}")


def quoted(prompt: str) -> str:
    """The texts in quotes of a prompt, joined by line breaks; single quotes count where there are no others."""
    prompt = prompt.replace('\\"', '"')  # as csv and JSON escape it
    found = _DOUBLE.findall(prompt)
    texts = ["".join(groups) for groups in found] if found else _SINGLE.findall(prompt)
    return "\n".join(text for text in texts if _letters(text))


def similarity(read: str, wanted: str) -> float:
    """1 - edits / length of `wanted`, at least 0; 1 if each of its lines is in `read`; without case and blanks."""
    target, text = _letters(wanted), _letters(read)
    if all(_letters(line) in text for line in wanted.split("\n")):
        return 1.0
    return max(0.0, 1 - _distance(text, target) / len(target))


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).translate(_STRAIGHT).casefold().split())


def _distance(first: str, second: str) -> int:
    """The Levenshtein distance: how many letters to insert, remove or replace."""
    row = list(range(len(second) + 1))
    for count, letter in enumerate(first, start=1):
        diagonal, row[0] = row[0], count
        for index, other in enumerate(second, start=1):
            diagonal, row[index] = row[index], min(row[index] + 1, row[index - 1] + 1, diagonal + (letter != other))
    return row[-1]
