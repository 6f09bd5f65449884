"""The shapes world's data set on disk, and the command that writes it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sharpening.errors import UserError
from tests.support.runs import ROOT
from tiny_world import signs
from tiny_world.make_shapes_dataset import main
from tiny_world.shapes import held_out_captions, score, training_captions


def test_the_data_set_is_an_ordinary_image_folder(tmp_path):
    from datasets import load_dataset

    folder = tmp_path / "new" / "shapes"
    assert main(["--output_dir", str(folder), "--num_images", "90", "--seed", "5"]) == 0
    assert [child.name for child in folder.parent.iterdir()] == ["shapes"]  # nothing left aside
    data = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == 90 and set(data.column_names) == {"image", "text"}
    assert set(data["text"]) == set(training_captions())  # and so no held-out caption
    images = np.stack([np.asarray(image) for image in data["image"]]) / 255.0
    assert images.shape == (90, 32, 32, 3)
    assert score(images, list(data["text"])).min() > 0.95


def test_the_wrong_fraction_and_the_seed_are_kept(tmp_path):
    flags = ["--num_images", "100", "--wrong_fraction", "0.4", "--captions", "all", "--size", "48"]
    for name in ("one", "two"):
        assert main(["--output_dir", str(tmp_path / name), "--seed", "7", *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "one" / "metadata.jsonl").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(tmp_path / "one" / row["file_name"])) for row in rows]) / 255.0
    assert images.shape[1:] == (48, 48, 3)
    assert (score(images, [row["text"] for row in rows]) < 0.8).sum() == 40
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_the_world_of_signs_is_written_alike(tmp_path):
    flags = ["--world", "signs", "--num_images", "30", "--wrong_fraction", "0.4", "--captions", "study"]
    prompts = ["--held_out_prompts", str(tmp_path / "held_out.txt"), "--pairs", str(tmp_path / "pairs")]
    assert main(["--output_dir", str(tmp_path / "signs"), *flags, *prompts]) == 0
    rows = [json.loads(line) for line in (tmp_path / "signs" / "metadata.jsonl").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(tmp_path / "signs" / row["file_name"])) for row in rows]) / 255.0
    captions = [row["text"] for row in rows]
    assert set(captions) <= set(signs.study_captions())
    assert (signs.template_match(images, captions) < 0.7).sum() == 12
    assert (tmp_path / "held_out.txt").read_text().splitlines() == signs.held_out_captions()
    assert (tmp_path / "pairs" / "train.parquet").exists()


def test_pairs_have_the_columns_of_pick_a_pic_and_labels_that_are_true(tmp_path):
    from sharpening.data.captioned_images import read_image
    from sharpening.data.preference_pairs import load_preference_pairs

    folder = tmp_path / "pairs"
    assert main(["--pairs", str(folder), "--num_images", "60", "--seed", "5"]) == 0
    assert main(["--pairs", str(tmp_path / "again"), "--num_images", "60", "--seed", "5"]) == 0
    file = "train.parquet"
    assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    options = {"dataset_config_name": None, "caption_column": "caption", "max_train_samples": None, "seed": 0}
    pairs = load_preference_pairs(dataset_name=str(folder), cache_dir=str(tmp_path / "cache"), **options)
    assert "54 pairs" in pairs.description and "6 ties left out" in pairs.description
    assert 10 < sum(pairs.first_is_best) < 44
    captions = list(pairs.dataset["caption"])
    assert set(captions) <= set(training_captions())
    earned = []
    for name in ("jpg_0", "jpg_1"):
        images = np.stack([np.asarray(read_image(stored)) for stored in pairs.dataset[name]]) / 255.0
        earned.append(score(images, captions))
    best = np.where(pairs.first_is_best, *earned)
    worst = np.where(pairs.first_is_best, *earned[::-1])
    assert best.min() > 0.95 and worst.max() < 0.8


def test_held_out_prompts_are_one_per_line(tmp_path):
    target = tmp_path / "held_out.txt"
    assert main(["--held_out_prompts", str(target)]) == 0
    assert target.read_text().splitlines() == held_out_captions()


def test_a_filled_folder_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"--output_dir .* already holds something; name .* an empty folder"):
        main(["--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match=r"--pairs .* already holds something; name .* an empty folder"):
        main(["--pairs", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    assert main(["--output_dir", str(tmp_path), "--num_images", "1"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.png", "metadata.jsonl"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "name something to write: --output_dir"),
        (["--num_images", "0"], "--num_images is 0"),
        (["--wrong_fraction", "1.5"], "--wrong_fraction is 1.5"),
        (["--size", "8"], "--size is 8"),
        (["--seed", "-1"], "--seed is -1"),
        (["--captions", "none"], "--captions: invalid choice: 'none'"),
    ],
)
def test_nonsense_flags_are_refused(flags, said, tmp_path):
    if flags:
        flags = ["--output_dir", str(tmp_path / "new"), *flags]
    with pytest.raises(UserError, match=said):
        main(flags)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "how", [[str(ROOT / "tiny_world" / "make_shapes_dataset.py")], ["-m", "tiny_world.make_shapes_dataset"]]
)
def test_the_command_runs_from_anywhere_as_a_file_and_as_a_module(how, tmp_path):
    command = [sys.executable, *how, "--held_out_prompts", "prompts.txt"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "prompts.txt").exists()
    refused = subprocess.run([*command, "--size=1"], cwd=tmp_path, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (2, "error: --size is 1, but it must lie in [16, inf)\n")
