"""The user study: `--blind` writes it, Chromium votes in it, `--votes` counts it."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from scripts.evaluate import main
from sharpening.errors import UserError
from sharpening.evaluation.blind_study import deal, write_study
from sharpening.evaluation.votes import wilson

NAMES = ("zebra", "okapi")


@pytest.fixture(scope="module")
def study(folder, tmp_path_factory):
    """The folder of an evaluation of two models with a study of 20 pairs."""
    out = tmp_path_factory.mktemp("study")
    flags = {"prompts": folder / "prompts.txt", "output_dir": out, "reward_model": "shapes", "blind": 20}
    flags |= {"num_images": 20, "num_inference_steps": 1, "guidance_scale": 1, "batch_size": 20, "grid_images": 1}
    models = [f"{name}={folder}/model{index}" for index, name in enumerate(NAMES)]
    assert main(["--models", *models, *(f"--{name}={value}" for name, value in flags.items())]) == 0
    return out


def key_of(folder):
    (path,) = folder.glob("vote_key-*.json")
    return json.loads(path.read_text())


def keys_for(key, wishes):
    """What to press so that each pair gets the wish of it: a model's name, or a tie."""
    sides = [{pair["left"]: "ArrowLeft", pair["right"]: "ArrowRight", "tie": " "} for pair in key["pairs"]]
    return [side[wish] for side, wish in zip(sides, wishes, strict=True)]


def saved(page, folder):
    with page.expect_download() as download:
        page.keyboard.press("s")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def counted(capsys, *files, folder=None):
    """The lines that `--votes` prints below its rule, cell by cell."""
    where = ["--output_dir", str(folder)] if folder else []
    assert main(["--votes", *map(str, files), *where]) == 0
    printed = capsys.readouterr().out.splitlines()
    return printed[0], [line.split() for line in printed[4:]]


def test_twenty_votes_by_keyboard_give_the_right_rates(visit, study, tmp_path, capsys):
    key = key_of(study)
    first, second = ["okapi"] * 12 + ["tie"] * 5 + ["zebra"] * 3, ["okapi"] * 9 + ["tie"] * 1 + ["zebra"] * 10
    files = []
    for wishes in (first, second):
        tab = visit(study / "vote.html", accept_downloads=True)
        for press in keys_for(key, wishes):
            tab.page.keyboard.press(press)
        assert tab.page.inner_text("#progress") == "all 20 pairs"
        files.append(saved(tab.page, tmp_path))
        assert tab.errors == tab.requests == []
        tab.page.context.close()
    said, lines = counted(capsys, files[0], folder=study)
    assert said.startswith("20 votes of 1 voter on 20 pairs")
    # 14.5 in 20, and where 0.725 lies 1.96 standard errors away, by bisection
    assert lines == [["okapi", "over", "zebra", "20", "12", "5", "3", "0.725", "[0.506,", "0.872]"]]
    said, lines = counted(capsys, *files, folder=study)
    assert said.startswith("40 votes of 2 voters") and lines[0][3:8] == ["40", "21", "6", "13", "0.600"]


def test_page_keeps_votes_and_takes_them_back(visit, study, tmp_path, capsys):
    tab = visit(study / "vote.html", accept_downloads=True)
    page = tab.page
    assert page.locator("#undo").is_disabled() and page.locator("#save").is_disabled()
    for press in ("ArrowLeft", "ArrowRight", "ArrowDown", "u", "Alt+ArrowLeft"):
        page.keyboard.press(press)
    page.click("[data-choice=tie]")
    page.keyboard.press("Space")  # means a tie, and does not press the button that was clicked
    page.focus("[data-choice=left]")
    page.keyboard.press("Space")  # presses the button that has the focus
    page.reload()
    assert page.inner_text("#progress") == "pair 6 of 20"
    assert page.get_attribute("progress", "value") == "5"
    file = saved(page, tmp_path)
    ballot = json.loads(file.read_text())
    assert ballot["votes"] == ["left", "right", "tie", "tie", "left"] and ballot["study"] == key_of(study)["study"]
    said, _ = counted(capsys, file, folder=study)
    assert said.startswith("5 votes of 1 voter")
    page.context.close()


def test_held_key_votes_once_and_the_next_voter_is_another(visit, study, tmp_path):
    page = visit(study / "vote.html", accept_downloads=True).page
    for _ in range(3):
        page.keyboard.down("ArrowLeft")  # without a release between them they repeat
    page.keyboard.up("ArrowLeft")
    assert page.inner_text("#progress") == "pair 2 of 20"
    for _ in range(19):
        page.keyboard.press("ArrowRight")
    one = json.loads(saved(page, tmp_path).read_text())
    page.click("text=Next voter")
    assert page.inner_text("#progress") == "pair 1 of 20"
    page.keyboard.press("ArrowLeft")
    other = json.loads(saved(page, tmp_path).read_text())
    assert one["voter"] != other["voter"] and len(one["votes"]) == 20 and other["votes"] == ["left"]
    page.context.close()


def test_shown_images_are_those_of_the_key_and_the_page_names_nobody(visit, study):
    text, key = (study / "vote.html").read_text(), key_of(study)
    assert not any(name in text for name in (*NAMES, "images/", ".png"))
    tab = visit(study / "vote.html", width=400)
    assert tab.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    pixels = """image => {
      const canvas = document.createElement('canvas');
      [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
      const pen = canvas.getContext('2d');
      pen.drawImage(image, 0, 0);
      return [...pen.getImageData(0, 0, canvas.width, canvas.height).data];
    }"""
    for pair in key["pairs"][:3]:
        assert tab.page.inner_text("#prompt") == pair["prompt"]
        for side in ("left", "right"):
            (file,) = study.glob(f"images/{pair[side]}-*/{pair['image']:05d}-*.png")
            image = tab.page.locator(f"#{side}")
            assert image.get_attribute("alt") == f"{side} image: {pair['prompt']}"
            image.evaluate("image => image.decode()")
            found = np.array(image.evaluate(pixels)).reshape(32, 32, 4)[..., :3]
            assert (found == np.array(Image.open(file).convert("RGB"))).all()
        tab.page.keyboard.press("ArrowDown")
    tab.page.context.close()


def test_lots():
    pairs = deal(["a", "b", "c"], 30, 60, seed=0)
    matches = Counter(frozenset((pair.left, pair.right)) for pair in pairs)
    assert len(matches) == 3 and set(matches.values()) == {20}
    for match in matches:
        images = [pair.image for pair in pairs if {pair.left, pair.right} == match]
        assert len(set(images)) == 20
        assert 3 <= sum(pair.left == min(match) for pair in pairs if {pair.left, pair.right} == match) <= 17
    assert pairs == deal(["a", "b", "c"], 30, 60, seed=0) != deal(["a", "b", "c"], 30, 60, seed=1)


def made(folder, size=4, count=6, models=("a", "b", "c")):
    """A study on made-up images: its folder, and its key."""
    rng = np.random.default_rng(0)
    images = {name: [folder / "images" / name / f"{index}.png" for index in range(count)] for name in models}
    for files in images.values():
        files[0].parent.mkdir(parents=True)
        for file in files:
            values = rng.integers(256, size=(size, size, 3), dtype=np.uint8)
            Image.fromarray(values).save(file, compress_level=0)
    prompts = [f"prompt {index}" for index in range(count)]
    key = write_study(folder, prompts, images, count, seed=0)
    assert write_study(folder, prompts, images, count, seed=0) == key  # written again it is the same study
    return json.loads(key.read_text())


def test_large_images_are_embedded_as_jpeg_whoever_drew_them(visit, tmp_path):
    made(tmp_path, size=720)
    text = (tmp_path / "vote.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 12 and "image/png" not in text
    tab = visit(tmp_path / "vote.html")
    left = tab.page.locator("#left")
    assert left.evaluate("image => image.decode().then(() => image.naturalWidth)") == 720
    tab.page.context.close()


def test_every_two_models_are_compared(tmp_path, capsys):
    key = made(tmp_path)
    votes = ["left" if pair["left"] < pair["right"] else "right" for pair in key["pairs"]]  # the earlier always
    file = tmp_path / "votes.json"
    file.write_text(json.dumps({"study": key["study"], "voter": "v", "votes": votes}))
    _, lines = counted(capsys, file)  # the key lies beside the file
    expected = [["b", "over", "a"], ["c", "over", "a"], ["c", "over", "b"]]
    assert [line[:3] for line in lines] == expected and all(
        line[3:8] == ["2", "0", "0", "2", "0.000"] for line in lines
    )


@pytest.mark.parametrize(("share", "count"), [(0.7, 20), (0.5, 3), (0.0, 10), (1.0, 10), (0.6125, 400)])
def test_wilson_interval_holds_the_shares_from_which_the_count_is_not_far(share, count):
    for bound in wilson(share, count):
        assert abs(share - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / count), abs=1e-9)


BALLOT = {"study": "STUDY", "voter": "v", "votes": ["left", "tie"]}
DAMAGED = {
    "no JSON": ("left, right", "is damaged or of another kind"),
    "cut off": (json.dumps(BALLOT)[:-9], "is damaged or of another kind"),
    "a list": ([1, 2], "is damaged or of another kind"),
    "another object": ({"a": 1}, "is damaged or of another kind"),
    "no list of votes": (BALLOT | {"votes": 3}, "content is damaged"),
    "another word": (BALLOT | {"votes": ["left", "up"]}, "content is damaged"),
    "a number": (BALLOT | {"votes": [1]}, "content is damaged"),
    "too many votes": (BALLOT | {"votes": ["tie"] * 7}, "holds 7 votes, but its study has 6 pairs"),
    "another study": (BALLOT | {"study": "0123"}, r"belongs to study 0123, whose vote_key-0123.json is not in"),
    "a path for a study": (BALLOT | {"study": "../x"}, "content is damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_and_foreign_files_are_one_sentence(case, tmp_path):
    content, said = DAMAGED[case]
    text = content if isinstance(content, str) else json.dumps(content)
    file = tmp_path / "votes.json"
    file.write_text(text.replace("STUDY", made(tmp_path)["study"]))
    with pytest.raises(UserError, match=said) as refusal:
        main(["--votes", str(file), "--output_dir", str(tmp_path)])
    assert str(file) in str(refusal.value) and "\n" not in str(refusal.value)


def test_files_that_do_not_go_together_are_refused(tmp_path):
    studies = [made(tmp_path / name, models=name) for name in ("ab", "cd")]
    files = []
    for index, study in enumerate((studies[0], studies[0], studies[1])):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps({"study": study["study"], "voter": "v", "votes": ["tie"]}))
    where = ["--output_dir", str(tmp_path / "ab")]
    with pytest.raises(UserError, match=r"1\.json is of the same voter as .*0\.json; leave out the older one"):
        main(["--votes", *map(str, files[:2]), *where])
    with pytest.raises(UserError, match=r"2\.json belongs to study .*; count each study by itself"):
        main(["--votes", str(files[0]), str(files[2]), *where])
    with pytest.raises(UserError, match=r"missing\.json is no file of votes \(it cannot be read"):
        main(["--votes", "missing.json", *where])
    next((tmp_path / "ab").glob("vote_key-*")).write_text('{"models": ["a"], "pairs": [{"left": "a", "right": "x"}]}')
    with pytest.raises(UserError, match=r"vote_key-.*\.json is damaged; write it again"):
        main(["--votes", str(files[0]), *where])
