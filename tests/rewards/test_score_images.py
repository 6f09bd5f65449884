"""`python reward.py`: images on disk scored as a table and as CSV or JSON."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reward import cli, load_reward
from tests.support.tiny_rewards import TINY
from tiny_world import shapes
from tiny_world.grader_server import Action, grades

ROOT = Path(__file__).parents[2]
CAPTIONS = shapes.training_captions()[:3]


@pytest.fixture
def folder(tmp_path):
    """Three images, one of another size, and files that are no images."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, caption in enumerate(CAPTIONS):
        image = shapes.draw(caption, rng)
        (image.resize((64, 64)) if index == 2 else image).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def told(text):
    """What a person is told, without what a slow machine adds of a reward that takes long to load."""
    return "\n".join(line for line in text.strip().splitlines() if not line.endswith(" ..."))


def expected(folder, spec):
    images = [Image.open(folder / f"{index}.png") for index in range(3)]
    return load_reward(spec).score(images, CAPTIONS)


def metadata(folder, key="text"):
    rows = [{"file_name": f"{index}.png", key: caption} for index, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*arguments):
    return cli([str(argument) for argument in arguments])


def test_table_and_files(folder, tmp_path, capsys):
    metadata(folder)
    spec = "shapes:2,jpeg_compressibility"
    assert run("--reward_model", spec, "--images", folder, "--output", tmp_path / "scores.csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", "prompt", "reward", "shapes", "jpeg_compressibility"]
    total, parts = expected(folder, spec)
    for index, caption in enumerate(CAPTIONS):
        line = lines[2 + index]
        assert line.startswith(f"{index}.png") and caption[:40] in line
        assert line.split()[-3:] == [f"{column[index]:.4f}" for column in (total, *parts.values())]
    assert lines[-2].split() == ["mean", *(f"{column.mean():.4f}" for column in (total, *parts.values()))]
    error = f"{total.std() / 3**0.5:.4f}"
    assert lines[-1].split()[:3] == ["standard", "error", error]
    assert len({len(line) for line in lines}) <= 2  # right-aligned columns end together

    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file_name"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert [float(row["reward"]) for row in rows] == total.tolist()
    assert run("--reward_model", spec, "--images", folder, "--output", tmp_path / "scores.json") == 0
    records = json.loads((tmp_path / "scores.json").read_text())
    assert [record["prompt"] for record in records] == CAPTIONS
    assert [record["shapes"] for record in records] == parts["shapes"].tolist()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("form", ["txt", "one line for all", "csv", "jsonl", "metadata.jsonl", "bom"])
def test_every_form_of_prompts(form, folder, tmp_path, capsys):
    prompts = tmp_path / f"prompts.{form if form in ('txt', 'csv', 'jsonl') else 'txt'}"
    arguments = ["--prompts", prompts]
    if form == "csv":
        rows = "".join(f'extra,{index}.png,"{caption}"\n' for index, caption in reversed(list(enumerate(CAPTIONS))))
        prompts.write_text("other,file_name,prompt\n" + rows)
    elif form in ("jsonl", "metadata.jsonl"):
        metadata(folder, "prompt")
        if form == "jsonl":
            (folder / "metadata.jsonl").rename(prompts)
        else:
            arguments = []
    elif form == "one line for all":
        prompts.write_text(CAPTIONS[0] + "\n\n")
    else:
        prompts.write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8-sig" if form == "bom" else "utf-8")
    output = tmp_path / "scores.json"
    assert run("--reward_model=shapes", "--images", folder, *arguments, "--output", output, "--batch_size=2") == 0
    got = [record["prompt"] for record in json.loads(output.read_text())]
    assert got == ([CAPTIONS[0]] * 3 if form == "one line for all" else CAPTIONS)


def test_prompt_of_several_lines_survives_the_way_through_csv(folder, tmp_path):
    prompts = ["a cat\non a mat", 'a "quoted", cat', "line\u2028separator"]
    source, output = tmp_path / "prompts.csv", tmp_path / "scores.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *((f"{row}.png", p) for row, p in enumerate(prompts))])
    for _ in range(2):  # the second time from this command's own output
        flags = ["--reward_model=jpeg_compressibility", "--images", folder, "--prompts", source]
        assert run(*flags, "--output", output) == 0
        with output.open(newline="") as file:
            assert [row["prompt"] for row in csv.DictReader(file)] == prompts
        source = output.rename(tmp_path / "again.csv")


def test_images_that_could_not_be_scored_are_shown_as_failed(server, folder, tmp_path, capsys):
    metadata(folder)
    server.plan[CAPTIONS[1]] = [Action(None, refusal="no")]
    server.default = Action(grades(overall=5))
    flags = ["--reward_model=mllm", "--base_url", server.base_url, "--cache_dir", tmp_path / "cache"]
    output = tmp_path / "scores.csv"
    assert run("--images", folder, *flags, "--reward_failure=skip", "--output", output) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("1.png") and set(lines[3].split()[-7:]) == {"failed"}
    assert lines[-2].split()[1] == "0.5000"
    with output.open(newline="") as file:
        assert [row["reward"] for row in csv.DictReader(file)] == ["0.5", "", "0.5"]
    output.unlink()
    assert run("--images", folder, *flags, "--output", output) == 1
    error = capsys.readouterr().err
    assert told(error).startswith("error: the reward mllm") and "refused: no" in error and not output.exists()


def test_part_that_a_prompt_does_not_ask_for_is_no_failure(
    folder, tiny_clip, tiny_blip_vqa, tiny_grounding_dino, tmp_path, capsys
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat next to a dog\na cat sat next to a dog\na cat and a dog\n")
    flags = [f"--detector={tiny_grounding_dino}", f"--t2i_complex_blip_vqa={tiny_blip_vqa}"]
    flags += [f"--t2i_complex_clip={TINY}/{tiny_clip[0]}", f"--output={tmp_path}/scores.csv"]
    assert run("--images", folder, "--prompts", prompts, "--reward_model=t2i_complex", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [[cell == "-" for cell in line.split()[-3:]] for line in lines[2:5]] == [
        [False, False, True],
        [False, False, False],
        [False, True, False],
    ]
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["t2i_complex/clip"] == "" for row in rows] == [True, False, False]
    assert [row["t2i_complex/spatial"] == "" for row in rows] == [False, False, True]
    assert all(row["reward"] for row in rows)


def corrupt(folder):
    (folder / "1.png").write_bytes(b"no image")
    metadata(folder)
    return []


def too_few(folder):
    (folder / "p.txt").write_text("a\nb\n")
    return ["--prompts", folder / "p.txt"]


def no_column(folder):
    (folder / "p.csv").write_text("name,text\n0.png,a\n")
    return ["--prompts", folder / "p.csv"]


def one_missing(folder):
    (folder / "p.csv").write_text("file_name,text\n0.png,a\n1.png,b\n")
    return ["--prompts", folder / "p.csv"]


def named_twice(folder):
    (folder / "p.csv").write_text("file_name,text\n0.png,a\n1.png,b\n2.png,c\nother/1.png,d\n")
    return ["--prompts", folder / "p.csv"]


def null_prompt(folder):
    lines = [json.dumps({"file_name": f"{row}.png", "text": None if row == 1 else "a"}) for row in range(3)]
    (folder / "p.jsonl").write_text("\n".join(lines))
    return ["--prompts", folder / "p.jsonl"]


def latin(folder):
    (folder / "p.txt").write_bytes("café".encode("latin-1"))
    return ["--prompts", folder / "p.txt"]


BAD = {
    "no prompts": (lambda folder: [], ["metadata.jsonl", "give --prompts FILE"]),
    "missing prompts": (lambda folder: ["--prompts", "/no.txt"], ["--prompts: there is no file /no.txt"]),
    "too few prompts": (too_few, ["2 prompts for 3 images", "one for all"]),
    "csv without the columns": (no_column, ["--prompts", "file_name and text"]),
    "an image without a prompt": (one_missing, ["no prompt for 1 of 3 images, 2.png"]),
    "an image named twice": (named_twice, ["1.png more than once"]),
    "a prompt that is null": (null_prompt, ["None for 1.png", "no text"]),
    "prompts in another encoding": (latin, ["p.txt cannot be read", "UTF-8"]),
    "no folder": (lambda folder: ["--images", "/nowhere"], ["--images /nowhere is not a folder"]),
    "no images": (lambda folder: ["--images", folder.parent], ["holds no image"]),
    "corrupt image": (corrupt, ["1.png is no readable image", "remove or replace it"]),
    "unknown reward": (lambda folder: ["--reward_model=clop"], ["did you mean clip?"]),
    "unknown kind of output": (lambda folder: ["--output=scores.xls"], ["must end in .csv or .json"]),
    "output nowhere": (lambda folder: ["--output=/nowhere/scores.csv"], ["its folder does not exist"]),
    "no batch": (lambda folder: ["--batch_size=0"], ["--batch_size is 0"]),
    "mllm without a key": (lambda folder: ["--reward_model=mllm"], ["OPENAI_API_KEY"]),
    "unknown flag": (lambda folder: ["--image=x"], ["--image", "--help"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, folder, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    arguments, said = BAD[case]
    if "prompt" not in case and "csv" not in case:
        metadata(folder)
    assert run("--images", folder, "--reward_model=shapes", *arguments(folder)) == 2
    error = capsys.readouterr().err
    assert told(error).startswith("error: ") and len(told(error).splitlines()) == 1
    for part in said:
        assert part in error


@pytest.mark.slow
def test_command_line_works_and_its_help_is_quick(folder, tmp_path):
    metadata(folder)
    command = [sys.executable, "reward.py", "--reward_model", "shapes", "--images", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[2].startswith("0.png")
    program = "import sys, reward\n"
    program += "try:\n    reward.cli(['--help'])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--mllm_max_calls" in result.stdout
