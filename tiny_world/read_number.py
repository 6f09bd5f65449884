"""The reward of the signs world: a network that reads text says what number is on the sign.

    --reward_model=tiny_world/read_number.py:ReadNumber

A reward file such as any user writes (README). It needs `pip install -e '.[ocr]'` and prompts of
`tiny_world/signs.py`.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sharpening.errors import require
from sharpening.rewards.ocr import check_installed
from tiny_world.signs import INKS, SIGNS, parse

if TYPE_CHECKING:
    from torch import Tensor

NETWORK = "PP-OCRv6_rec_small.onnx"
HEIGHT, WIDTH = 48, 64  # pixels; the network reads lines 48 pixels high, in one frame for each 8 of their width
CHUNK = 32  # images a forward: each comes with the probabilities of 18,710 characters in 8 frames
INK_SHARE = (
    0.02  # of the pixels, the furthest from the sign's colour, that are surely ink: so many a number has at least
)
OTHERS = {"black": (0, 0, 0), "gray": (128, 128, 128), "green": (20, 140, 45), "purple": (155, 35, 190)}  # no inks
BLUR = 0.15  # how far a drawn colour may lie from its name, in RGB of [0, 1]


class ReadNumber:
    """How surely the number and the ink of a prompt are on the sign.

    Range: [0, 1]: the mean of four probabilities: that the first character read is the first digit, that the last one
    is the second, that both and nothing else are read, and that the ink has its name. A clean drawing is near 1, one
    with another ink near 3/4, with one other digit near 1/2, with another number near 1/4, as is any mark in the right
    ink, and a sign without a mark 0.

    The text recognition network that RapidOCR ships in its package reads the whole image as one line. It gives the
    probability of each character in each of 8 frames; the three of the number are sums over all ways in which the
    frames can spell it (connectionist temporal classification, Graves et al. 2006), and so exact and smooth. The ink's
    is a softmax over the distances of the colours of inks, of signs and of four others to the mean colour of what
    differs most from the border. The third and the fourth are logged as parts, `number` and `ink`. Each image is
    judged alone; 100 images take about a second of one thread.

    Raises:
        UserError: naming the package, if it is not installed.
        ValueError: a prompt is no caption of the signs world.
    """

    def __init__(self) -> None:
        check_installed("tiny_world/read_number.py:ReadNumber")
        import onnxruntime
        import rapidocr
        import torch

        network = Path(rapidocr.__file__).parent / "models" / NETWORK
        require(network.is_file(), f"{network} is missing; install rapidocr again with pip install -e '.[ocr]'")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # onnxruntime would take every core
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(network), options, providers=["CPUExecutionProvider"])

    @cached_property
    def _characters(self) -> list[str]:
        """What each output stands for; the first is the blank between characters, the last one a space."""
        listed = self._session.get_modelmeta().custom_metadata_map["character"].splitlines()
        return ["", *listed, " "]

    def get_reward(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        frames = self._read(images)  # (B, frames, characters)
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        parts = np.zeros((len(prompts), 4))
        for row, prompt in enumerate(prompts):
            _, number, ink = parse(prompt)
            wanted = [self._characters.index(digit) for digit in number]
            parts[row] = [*number_probabilities(frames[row], *wanted), ink_probability(pixels[row], ink)]
        scores = torch.from_numpy(parts).float()
        return scores.mean(dim=1), {"number": scores[:, 2], "ink": scores[:, 3]}

    def read(self, images: Tensor) -> list[str]:
        """The most likely text in each image (B, 3, H, W)."""
        texts = []
        for likely in self._read(images).argmax(axis=-1):  # (frames,)
            changed = [index for index, before in zip(likely, [0, *likely[:-1]], strict=True) if index != before]
            texts.append("".join(self._characters[index] for index in changed))
        return texts

    def _read(self, images: Tensor) -> np.ndarray:
        """Probabilities (B, frames, characters) of images (B, 3, H, W) in [0, 1]."""
        import torch.nn.functional as F

        size = {"size": (HEIGHT, WIDTH), "mode": "bilinear", "align_corners": False, "antialias": True}
        read = []
        for chunk in images.cpu().float().split(CHUNK):
            line = F.interpolate(chunk, **size).clamp(0, 1).flip(1) * 2 - 1  # blue, green, red, as OpenCV has it
            read.append(self._session.run(None, {self._session.get_inputs()[0].name: line.numpy()})[0])
        return np.concatenate(read)


def number_probabilities(frames: np.ndarray, first: int, second: int) -> tuple[float, float, float]:
    """Of the first character read being `first`, the last one `second`, and of nothing but the two being read.

    `frames` (T, characters) are independent distributions; character 0 is the blank, and a character counts once
    however many frames in a row show it.
    """
    blank = frames[:, 0]

    def leads(blank: np.ndarray, character: np.ndarray) -> float:
        """All frames before one that shows the character are blank."""
        return float(np.cumprod([1.0, *blank[:-1]]) @ character)

    # States: blanks, the first, blanks between, the second, blanks. Equal digits need a blank between.
    shown = np.stack([blank, frames[:, first], blank, frames[:, second], blank], axis=1)  # (T, 5)
    reached = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
    for frame in shown:
        step = reached + np.roll(reached, 1) * [0, 1, 1, 1, 1]
        step[3] += reached[1] * (first != second)
        reached = step * frame
    return leads(blank, frames[:, first]), leads(blank[::-1], frames[::-1, second]), float(reached[3] + reached[4])


def ink_probability(pixels: np.ndarray, ink: str) -> float:
    """Of what differs most from the border having the colour `ink`, near 0 if nothing differs; pixels (H, W, 3) in
    [0, 1]."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    flat = pixels.reshape(-1, 3)
    difference = np.linalg.norm(flat - np.median(border, axis=0), axis=1)
    most = difference >= np.quantile(difference, 1 - INK_SHARE)
    paint, seen = flat[most].mean(axis=0), 1 - np.exp(-((difference[most].mean() / BLUR) ** 2) / 2)
    names = {**INKS, **SIGNS, **OTHERS}
    distance = np.linalg.norm(np.array(list(names.values())) / 255 - paint, axis=1)
    likely = np.exp(-((distance / BLUR) ** 2) / 2 + (distance.min() / BLUR) ** 2 / 2)
    return float(seen * likely[list(names).index(ink)] / likely.sum())
