"""The reward of text rendering, with RapidOCR's real weights, on drawn text."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from reward import REWARD_FLAGS, check_reward_flags, cli, load_reward
from sharpening.errors import UserError
from sharpening.flags import parse
from sharpening.rewards.calling import RewardError
from sharpening.rewards.ocr import OCRReward, quoted, similarity

FONT = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 32)


def drawn(text, angle=0, size=256, ink="black", paper="white"):
    image = Image.new("RGB", (size, size), paper)
    ImageDraw.Draw(image).multiline_text((size / 2, size / 2), text, ink, FONT, "mm", spacing=12)
    return image.rotate(angle, fillcolor=paper)


@pytest.fixture(scope="module")
def reward():
    return load_reward("ocr")


@pytest.mark.parametrize(
    ("image", "prompt", "score"),
    [
        (drawn("COFFEE"), 'a cup with the word "COFFEE" on it', 1),
        (drawn("COFFEE"), 'a cup with the word "coffee"', 1),
        (drawn("COFFEX"), 'a cup with the word "COFFEE" on it', 1 - 1 / 6),
        (drawn("COFFE"), 'a cup with the word "COFFEE" on it', 1 - 1 / 6),
        (drawn("MUSIC"), 'a cup with the word "COFFEE" on it', 0),
        (drawn(""), 'a cup with the word "COFFEE" on it', 0),
        (drawn("COFFEE", angle=15), 'a cup with the word "COFFEE" on it', 1),
        (drawn("COFFEE", angle=90), 'a cup with the word "COFFEE" on it', 1),
        (drawn("COFFEE", angle=180), 'a cup with the word "COFFEE" on it', 1),
        (drawn("COFFEE", ink="yellow", paper="navy"), 'a cup with the word "COFFEE" on it', 1),
        (drawn("FRESH\nCOFFEE\nTODAY"), 'a board that says "Fresh coffee today"', 1),
        (drawn("FRESH\nCOFFEE\nTODAY"), 'a board with the word "coffee" and more', 1),
        (drawn("TODAY\nFRESH"), 'a board with "fresh" above "today"', 1),
        (drawn("FRESH\nTODEY"), 'a board with "fresh" above "today"', 1 - 1 / 10),
        (drawn("50% OFF!"), 'a sign: "50% off!"', 1),
        (drawn("Grüße"), "ein Schild mit „Grüße“", 1),
        (drawn("déjà vu"), "une affiche « déjà vu »", 1),
        (drawn("mañana"), "un cartel “mañana”", 1),
    ],
)  # fmt: skip
def test_score_is_the_share_of_the_quoted_text_that_is_read(image, prompt, score, reward):
    assert reward.get_reward(image, prompt).item() == pytest.approx(score, abs=1e-4)


def test_score_is_the_same_alone_and_in_any_batch(reward):
    images = [drawn(text) for text in ("OPEN", "OPFN", "", "SALE\nOPEN")]
    prompts = ['a shop that says "OPEN"'] * 4
    together = reward.get_reward(images, prompts)
    assert together.tolist() == pytest.approx([1, 0.75, 0, 1])
    torch.testing.assert_close(torch.cat([reward.get_reward(image, prompts[0]) for image in images]), together)
    torch.testing.assert_close(reward.get_reward(images[::-1], prompts), together.flip(0))


def test_extreme_images_have_an_ordinary_score(reward):
    noise = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    for images in (noise, torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 1, 1)):
        assert 0 <= reward.get_reward(images, ['"HELLO"']).item() < 0.5


def test_strip_is_read_with_a_white_margin(monkeypatch):
    """The reader enlarges by the shorter side, without bounds."""
    reward, shapes = OCRReward(), []
    reader = reward.reader
    monkeypatch.setattr(reward, "reader", lambda image: shapes.append(image.shape) or reader(image))
    for shape in ((4, 512), (512, 4), (64, 96)):
        reward.read(np.zeros((*shape, 3), np.uint8))
    assert shapes == [(64, 512, 3), (512, 64, 3), (64, 96, 3)]


def test_prompt_without_a_text_in_quotes_has_no_score():
    images, prompts = [drawn("OPEN")] * 3, ['says "OPEN"', "a dog", 'an empty ""']
    with pytest.raises(RewardError, match="its prompt has no text in quotes") as caught:
        load_reward("ocr").get_reward(images, prompts)
    assert caught.value.rows == [1, 2]
    scores = load_reward("ocr", failure="skip").get_reward(images, prompts)
    assert scores[0] == 1 and scores[1:].isnan().all()


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign "STOP" by a road', "STOP"),
        ('"FRESH" above "FISH"', "FRESH\nFISH"),
        ("a sign “Stop here”", "Stop here"),
        ("ein Schild „Halt“", "Halt"),
        ("une affiche «Ici»", "Ici"),
        ("看板「営業中」", "営業中"),
        ("a sign that says 'STOP'", "STOP"),
        ("a cake with 'it's mine', the dogs' bowl", "it's mine"),
        ("""the cat's "STOP" isn't 'GO'""", "STOP"),
        ("the dogs' and the cats' bowls aren't here", ""),
        ('a 6" pipe and a 7" hose', ""),
        ('a 6" pipe that says "GAS"', "GAS"),
        ('a sign \\"OPEN\\"', "OPEN"),
        ("ein Schild »Halt«", "Halt"),
        ("a lone \" quote", ""),
        ('empty "" and " "', ""),
        ("", ""),
    ],
)  # fmt: skip
def test_text_in_quotes(prompt, text):
    assert quoted(prompt) == text


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("stop", "Stop", 1),
        ("S TO\nP", "stop", 1),
        ("please stop now", "stop", 1),
        ("now stop please", "stop\nnow", 1),
        ("sotp", "stop", 0.5),
        ("sto", "stop", 0.75),
        ("stopp", "stap", 0.5),
        ("", "stop", 0),
        ("something else altogether", "stop", 0),
        ("\uff33\uff34\uff2f\uff30", "stop", 1),
        ("STRASSE", "straße", 1),
        ("don't “go”", 'don\u2019t "go"', 1),
    ],
)
def test_similarity(read, wanted, score):
    assert similarity(read, wanted) == pytest.approx(score)


def test_command_scores_images_on_disk(tmp_path, capsys):
    drawn("OPEN").save(tmp_path / "0.png")
    drawn("OPFN").save(tmp_path / "1.png")
    (tmp_path / "prompts.txt").write_text('a shop that says "OPEN"\n')
    arguments = ["--images", tmp_path, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "scores.json"]
    assert cli(["--reward_model=ocr", *map(str, arguments)]) == 0
    assert [row["ocr"] for row in json.loads((tmp_path / "scores.json").read_text())] == [1, 0.75]
    assert "OPEN" in capsys.readouterr().out


def test_without_the_package_it_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    values = vars(parse("", {"reward": REWARD_FLAGS}, ["--reward_model=ocr"]))
    for refused in (lambda: check_reward_flags(values), lambda: load_reward("ocr")):
        with pytest.raises(UserError) as caught:
            refused()
        message = "--reward_model ocr needs rapidocr and onnxruntime; install it with pip install -e '.[ocr]'"
        assert str(caught.value) == message
