"""Compared pairs of images: what is read, what is left out, what is refused, and what a draw of them holds."""

import pytest
import torch

from sharpening.data.encoding_cache import collate
from sharpening.data.preference_pairs import IMAGES, CachedPairs, load_preference_pairs
from sharpening.errors import UserError
from tests.support.captioned_files import Encoders, cache, encoded, picture, position_image, write_pairs

pytestmark = pytest.mark.usefixtures("no_progress_bars")

LABELS = [1, 0, 0.5, 1.0, 0]


def rows(labels=LABELS, size=(24, 16)):
    return [(picture(2 * n, size), picture(2 * n + 1, size), label, f"c{n}") for n, label in enumerate(labels)]


def load(folder, **changes):
    options = {
        "dataset_name": str(folder), "dataset_config_name": None, "caption_column": "caption",
        "max_train_samples": None, "seed": 0, "cache_dir": str(folder.parent / "hf"),
    }  # fmt: skip
    return load_preference_pairs(**options | changes)


def cached(tmp_path, pairs, encoders=None, **changes):
    encoders = encoders or Encoders()
    parts = [
        cache(tmp_path, pairs.dataset, encoders, image_column=name, caption_column="caption", **changes)[0]
        for name in IMAGES
    ]
    return CachedPairs(parts, pairs.first_is_best)


def reds(latents):
    """The red of the pictures, of latents as `Encoders` makes them, from 0 to 255."""
    return ((latents[..., 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize("as_images", [False, True], ids=["bytes", "images"])
def test_preferred_image_comes_first_and_ties_are_left_out(as_images, tmp_path):
    pairs = load(write_pairs(tmp_path / "d", rows(), as_images))
    assert pairs.first_is_best == [True, False, True, False]
    assert "4 pairs" in pairs.description and "5 read: 1 ties left out" in pairs.description
    data = cached(tmp_path, pairs)
    assert len(data) == 4
    batch = collate([data[row, row] for row in range(4)])
    # Picture k is 10 k red; row n of the data has the pictures 2 n and 2 n + 1.
    assert reds(batch["latents"]) == [[0, 10], [30, 20], [60, 70], [90, 80]]
    assert batch["caption"] == ["c0", "c1", "c3", "c4"]
    assert batch["latents"].shape == (4, 2, 4, 16, 16) and batch["time_ids"].shape == (4, 2, 6)


@pytest.mark.parametrize("flip", [False, True])
def test_both_images_are_cropped_at_one_place_and_mirrored_alike(flip, tmp_path):
    """The pixels of both are their own coordinates, so alike latents were cut alike; places differ between rows."""
    images = [(position_image(90, 30), position_image(90, 30), 1, f"c{n}") for n in range(12)]
    data = cached(tmp_path, load(write_pairs(tmp_path / "d", images)), random_flip=flip)
    draws = [data[row, 0] for row in range(12)]
    for draw in draws:
        assert torch.equal(draw["latents"][0], draw["latents"][1])
        assert torch.equal(draw["time_ids"][0], draw["time_ids"][1])
    assert len({tuple(draw["time_ids"][0].tolist()) for draw in draws}) > 4


def test_images_of_two_sizes_keep_their_own_time_ids(tmp_path):
    images = [(position_image(40, 20), position_image(20, 60), 0, "c")]
    draw = cached(tmp_path, load(write_pairs(tmp_path / "d", images)))[0, 0]
    assert draw["time_ids"][:, :2].tolist() == [[60, 20], [20, 40]]  # height, width; the second is preferred


def test_second_call_encodes_nothing(tmp_path):
    pairs, encoders = load(write_pairs(tmp_path / "d", rows())), Encoders()
    first = cached(tmp_path, pairs, encoders)
    assert encoders.images == 8 and len(encoders.prompts) == 4
    second = cached(tmp_path, load(tmp_path / "d"), encoders)
    assert encoders.images == 8 and len(encoders.prompts) == 4
    assert torch.equal(first[2, 0]["latents"], second[2, 0]["latents"])


def test_max_train_samples_is_a_seeded_choice_of_decided_pairs(tmp_path):
    folder = write_pairs(tmp_path / "d", rows([0.5, 1, 0, 1, 0.5, 0, 1]))
    chosen = [load(folder, max_train_samples=3, seed=seed) for seed in (0, 0, 1, 2)]
    captions = [pairs.dataset["caption"][:] for pairs in chosen]
    assert captions[0] == captions[1] and len({tuple(found) for found in captions}) > 1
    of_caption = {"c1": True, "c2": False, "c3": True, "c5": False, "c6": True}
    for pairs, found in zip(chosen, captions, strict=True):
        assert len(found) == 3 and pairs.first_is_best == [of_caption[caption] for caption in found]
        assert "3 of 5 pairs" in pairs.description


def without(*names):
    def write(folder):
        import datasets

        write_pairs(folder, rows())
        made = datasets.load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")
        made.remove_columns(list(names)).to_parquet(str(folder / "train.parquet"))
        return folder

    return write


BAD = {
    "no label": (without("label_0"), ["no column label_0", "jpg_0, jpg_1, caption", "--caption_column"]),
    "no second image and no label": (without("jpg_1", "label_0"), ["no column jpg_1 and no label_0", "rename"]),
    "no caption": (without("caption"), ["no column caption", "--caption_column"]),
    "only ties": (lambda d: write_pairs(d, rows([0.5, 0.5])), ["only ties", "label_0"]),
    "a label out of range": (lambda d: write_pairs(d, rows([1, 0, 2])), ["label_0 holds int 2 in row 2", "0.5"]),
    "no label in a row": (lambda d: write_pairs(d, rows([1.0, None])), ["label_0 holds NoneType None in row 1"]),
    "a word as label": (lambda d: write_pairs(d, rows(["a", "b"])), ["label_0 holds str 'a' in row 0"]),
    "an empty caption": (
        lambda d: write_pairs(d, rows(), caption=["a", "b", "c", " ", "e"]), ["--caption_column", "row 3"],
    ),
    "numbers for images": (lambda d: write_pairs(d, rows(), jpg_1=[1, 2, 3, 4, 5]), ["jpg_1", "not images"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, tmp_path):
    write, said = BAD[name]
    with pytest.raises(UserError) as refusal:
        load(write(tmp_path / "d"))
    assert "\n" not in str(refusal.value)
    for part in said:
        assert part in str(refusal.value)


def test_a_damaged_image_is_named_by_its_column_and_row(tmp_path):
    damaged = [encoded(picture(n)) for n in range(5)]
    damaged[3] = damaged[3][:40]
    pairs = load(write_pairs(tmp_path / "d", rows(), jpg_1=damaged))
    with pytest.raises(UserError, match="'jpg_1': the image in row 3 of the data set"):
        cached(tmp_path, pairs)
