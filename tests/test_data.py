"""Real files, real `datasets`; the encoders are plain functions. Every cache lives under the test's own folder."""

import gc
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sharpening import data
from sharpening.draws import DrawSampler, draw_generator
from sharpening.errors import UserError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def no_progress_bars(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(number, size=(24, 16)):
    return Image.new("RGB", size, (10 * number, 255 - 10 * number, 7))


def image_folder(folder, captions, column="text"):
    """An image folder with metadata.jsonl; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, caption in enumerate(captions):
        picture(number).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", column: caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_tar(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in rows:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def load(tmp_path, **changes):
    options = {
        "dataset_name": None,
        "dataset_config_name": None,
        "train_data_dir": None,
        "image_column": "image",
        "caption_column": "text",
        "max_train_samples": None,
        "seed": 0,
        "cache_dir": str(tmp_path / "hf"),
    }
    return data.load_captioned_images(**options | changes)


class Encoders:
    """Stand-ins that keep the pixels and the text recognisable, and count what they were given."""

    def __init__(self):
        self.images, self.prompts = 0, []

    def encode_images(self, pixels):
        self.images += len(pixels)
        return torch.cat([pixels, pixels[:, :1]], 1)

    def encode_prompts(self, prompts):
        self.prompts += prompts
        codes = torch.tensor([sum(map(ord, prompt)) / 1000 for prompt in prompts])
        return codes[:, None, None].expand(-1, 77, 8), codes[:, None].expand(-1, 4)


def cache(tmp_path, dataset, encoders=None, **changes):
    """The cached data and the encoders that were at its disposal."""
    encoders = encoders or Encoders()
    options = {
        "image_column": "image",
        "caption_column": "text",
        "resolution": 16,
        "center_crop": False,
        "random_flip": True,
        "seed": 0,
        "encode_images": encoders.encode_images,
        "encode_prompts": encoders.encode_prompts,
        "batch_size": 2,
        "key": {"model": "m"},
        "cache_dir": str(tmp_path / "cache"),
        "dtype": torch.float32,
    }
    return data.cache_latents_and_embeddings(dataset, **options | changes), encoders


def dataset_of(images, captions):
    stored = [{"bytes": image if isinstance(image, bytes) else encoded(image), "path": None} for image in images]
    made = datasets.Dataset.from_dict({"image": stored, "text": captions})
    return made.cast_column("image", datasets.Image(decode=False))


# ------------------------------------------------------------------------------------------------------------ LOADING
def _parquet(folder, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"image": [encoded(picture(n)) for n in range(3)], "text": ["c0", "c1", "c2"]} | columns
    datasets.Dataset.from_dict(rows).to_parquet(str(folder / "train.parquet"))
    return folder / "train.parquet"


def _image_parquet(folder):
    folder.mkdir(parents=True)
    made = dataset_of([picture(n) for n in range(3)], ["c0", "c1", "c2"])
    made.cast_column("image", datasets.Image()).to_parquet(str(folder / "train.parquet"))
    return folder


def _saved(folder, as_dict):
    made = dataset_of([picture(n) for n in range(3)], ["c0", "c1", "c2"]).cast_column("image", datasets.Image())
    (datasets.DatasetDict({"train": made, "test": made.select([0])}) if as_dict else made).save_to_disk(str(folder))
    return folder


def _tars(folder):
    for number in range(3):
        rows = [
            (f"{number}.png", encoded(picture(number))),
            (f"{number}.txt", f"c{number}".encode()),
            (f"{number}.json", json.dumps({"caption": f"c{number}", "width": 24}).encode()),
        ]
        write_tar(folder / f"shard-{number}.tar", rows)
    return folder


def _paths_parquet(folder):
    image_folder(folder / "images", ["", "", ""])
    return _parquet(folder, image=[str(folder / "images" / f"{n}.png") for n in range(3)])


TAR = {"image_column": "png", "caption_column": "txt"}
KINDS = {
    "train_data_dir": lambda d: {"train_data_dir": image_folder(d, ["c0", "c1", "c2"])},
    "odd folder name": lambda d: {"train_data_dir": image_folder(d / "a [1] *", ["c0", "c1", "c2"])},
    "own column": lambda d: {"train_data_dir": image_folder(d, ["c0", "c1", "c2"], "cap"), "caption_column": "cap"},
    "image folder by name": lambda d: {"dataset_name": image_folder(d, ["c0", "c1", "c2"])},
    "parquet file of bytes": lambda d: {"dataset_name": _parquet(d)},
    "parquet file of paths": lambda d: {"dataset_name": _paths_parquet(d)},
    "parquet folder of images": lambda d: {"dataset_name": _image_parquet(d)},
    "parquet glob": lambda d: {"dataset_name": _parquet(d).with_name("tr*.parquet")},
    "saved Dataset": lambda d: {"dataset_name": _saved(d, False)},
    "saved DatasetDict": lambda d: {"dataset_name": _saved(d, True)},
    "tar glob": lambda d: {"dataset_name": _tars(d) / "*.tar", **TAR},
    "tar folder": lambda d: {"dataset_name": _tars(d), **TAR},
    "tar json": lambda d: {"dataset_name": _tars(d), "image_column": "png", "caption_column": "json.caption"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_set_gives_the_same_pictures(tmp_path, kind):
    options = {name: str(value) for name, value in KINDS[kind](tmp_path / "data").items()}
    dataset = load(tmp_path, **options)
    image_column, caption_column = options.get("image_column", "image"), options.get("caption_column", "text")
    assert dataset.column_names == [image_column, caption_column]
    assert dataset.features[image_column] == datasets.Image(decode=False)
    cached, encoders = cache(tmp_path, dataset, image_column=image_column, caption_column=caption_column)
    assert encoders.images == len(cached) == 3
    for row in range(3):
        item = cached[row, row]
        colour = (item["latents"][:3, 5, 5] + 1) * 127.5
        assert item["caption"] == f"c{row}"
        assert colour.round().tolist() == [10 * row, 255 - 10 * row, 7]
        assert item["time_ids"][:2].tolist() == [16, 24]


def test_a_name_that_is_no_path_goes_to_the_hub(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return dataset_of([picture(0)], ["c"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load(tmp_path, dataset_name="someone/pictures", dataset_config_name="large")) == 1
    assert calls == [(("someone/pictures", "large"), {"split": "train", "cache_dir": str(tmp_path / "hf")})]

    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"--dataset_name .someone/pictures. cannot be loaded.*no route to the hub.*check"
    ):
        load(tmp_path, dataset_name="someone/pictures")


def _only_test_split(folder):
    datasets.DatasetDict({"test": dataset_of([picture(0)], ["c"])}).save_to_disk(str(folder))
    return folder


def _empty(folder):
    folder.mkdir()
    return folder


def _broken_parquet(folder):
    folder.mkdir()
    (folder / "a.parquet").write_bytes(b"PAR1 no such thing")
    return folder / "a.parquet"


def _text_file(folder):
    folder.mkdir()
    (folder / "a.txt").write_text("hello")
    return folder / "a.txt"


FOLDER = lambda d: {"train_data_dir": image_folder(d, ["a", "b"])}  # noqa: E731
BAD_INPUTS = {
    "no image column": (lambda d: FOLDER(d) | {"image_column": "pic"}, "--image_column 'pic'.*choose one of: image, "),
    "no caption column": (lambda d: FOLDER(d) | {"caption_column": "cap"}, "--caption_column 'cap'.*image, text"),
    "no metadata": (lambda d: (image_folder(d, ["a"]) / "metadata.jsonl").unlink() or {"train_data_dir": d}, "text"),
    "images that are numbers": (lambda d: {"dataset_name": _parquet(d, image=[1, 2, 3])}, "--image_column.*int64"),
    "null caption": (
        lambda d: {"dataset_name": _parquet(d, text=["a", None, "b"])},
        "--caption_column 'text' holds None.* in row 1 of",
    ),
    "blank caption": (lambda d: {"dataset_name": _parquet(d, text=["a", "b", " "])}, "--caption_column.*row 2 of"),
    "numeric caption": (lambda d: {"dataset_name": _parquet(d, text=[1, 2, 3])}, "--caption_column.*int 1 in row 0"),
    "empty list": (lambda d: {"dataset_name": _parquet(d, text=[["a"], [], ["b"]])}, "--caption_column.*row 1 of"),
    "null in a list": (
        lambda d: {"dataset_name": _parquet(d, text=[["a"], ["b", None], ["c"]])},
        "--caption_column.*row 1 of",
    ),
    "one column for both": (lambda d: FOLDER(d) | {"caption_column": "image"}, "--caption_column 'image'.*row 0"),
    "no rows": (lambda d: {"dataset_name": _parquet(d, image=[], text=[])}, "--dataset_name.*no (rows|data)"),
    "no saved rows": (
        lambda d: datasets.Dataset.from_dict({"image": [], "text": []}).save_to_disk(str(d)) or {"dataset_name": d},
        "holds no rows",
    ),
    "empty folder": (lambda d: {"dataset_name": _empty(d)}, "--dataset_name.*cannot be loaded"),
    "empty image folder": (lambda d: {"train_data_dir": _empty(d)}, "--train_data_dir.*cannot be loaded"),
    "missing folder": (lambda d: {"train_data_dir": d / "gone"}, "--train_data_dir.*is not a folder"),
    "missing path": (lambda d: {"dataset_name": d / "gone"}, "--dataset_name.*names no file"),
    "missing file": (lambda d: {"dataset_name": "gone.parquet"}, "--dataset_name 'gone.parquet' names no file"),
    "glob of nothing": (lambda d: {"dataset_name": d / "*.tar"}, "--dataset_name.*names no file"),
    "unknown kind of file": (lambda d: {"dataset_name": _text_file(d)}, "--dataset_name.*unknown kind.*parquet"),
    "broken parquet": (lambda d: {"dataset_name": _broken_parquet(d)}, "--dataset_name.*cannot be loaded.*[Pp]arquet"),
    "no train split": (lambda d: {"dataset_name": _only_test_split(d)}, "--dataset_name.*no split 'train', only test"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_input_is_one_sentence_that_names_the_flag(tmp_path, name):
    make, message = BAD_INPUTS[name]
    options = {flag: str(value) for flag, value in make(tmp_path / "data").items()}
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_max_train_samples_is_a_seeded_choice(tmp_path):
    folder = str(image_folder(tmp_path / "d", [f"c{n}" for n in range(12)]))
    chosen = [load(tmp_path, train_data_dir=folder, max_train_samples=4, seed=seed)["text"][:] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 4
    assert len(load(tmp_path, train_data_dir=folder, max_train_samples=100)) == 12


def test_a_row_is_named_as_it_stands_in_the_data_and_unchosen_rows_do_not_matter(tmp_path):
    captions = [f"c{n}" for n in range(12)]
    folder = image_folder(tmp_path / "d", captions)
    (folder / "7.png").write_bytes(b"damaged")
    dataset = load(tmp_path, train_data_dir=str(folder), max_train_samples=11, seed=0)
    assert "c7" in dataset["text"][:]
    with pytest.raises(UserError, match=r"the image in row 7 of the data set \('.*/7.png'\) cannot be read"):
        cache(tmp_path, dataset)
    cache(tmp_path, dataset.filter(lambda row: row["text"] != "c7"))


def test_checking_captions_reads_no_image(tmp_path, monkeypatch):
    folder = str(_image_parquet(tmp_path / "d"))

    def opened(*_, **__):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image, "open", opened)
    dataset = load(tmp_path, dataset_name=folder)
    assert isinstance(dataset[0]["image"]["bytes"], bytes)


# --------------------------------------------------------------------------------------------------- CROP AND RESIZE
def crop(image, resolution=16, center_crop=True, random_flip=False, seed=0):
    pixels, time_ids = data.crop_and_resize(
        image, resolution, center_crop, random_flip, torch.Generator().manual_seed(seed)
    )
    assert pixels.shape == (3, resolution, resolution) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    return ((pixels + 1) * 127.5), time_ids


def position_image(width, height):
    """Red is the pixel's x, green its y."""
    grid = np.zeros((height, width, 3), np.uint8)
    grid[..., 0], grid[..., 1] = np.arange(width)[None], np.arange(height)[:, None]
    return Image.fromarray(grid)


@pytest.mark.parametrize("size", [(200, 64), (64, 200), (64, 64), (65, 64)])
@pytest.mark.parametrize("center_crop", [True, False])
def test_time_ids_name_the_pixels_that_the_model_sees(size, center_crop):
    width, height = size
    seen = Counter()
    for seed in range(40):
        pixels, time_ids = crop(position_image(*size), 64, center_crop, True, seed)
        original_height, original_width, top, left, *target = time_ids
        assert (original_width, original_height, target) == (*size, [64, 64])
        x, y = pixels[0].round(), pixels[1].round()
        flipped = bool(x[0, 0] > x[0, 1])
        across = torch.arange(left, left + 64)
        expected_x = width - 1 - across if flipped else across
        assert torch.equal(x, expected_x.expand(64, 64).float())
        assert torch.equal(y, torch.arange(top, top + 64)[:, None].expand(64, 64).float())
        seen[flipped, top, left] += 1
    assert 8 < sum(count for (flipped, *_), count in seen.items() if flipped) < 32
    corners = {(top, left) for _, top, left in seen}
    if center_crop:
        assert corners == {(round((height - 64) / 2), round((width - 64) / 2))}
    elif abs(width - height) > 1:
        assert len(corners) > 20


def test_the_corner_counts_in_the_scaled_image():
    image = position_image(240, 120)
    pixels, (height, width, top, left, *_) = crop(image, 40, center_crop=False, seed=3)
    assert (height, width, top) == (120, 240, 0)
    expected = 3 * (torch.arange(left, left + 40) + 0.5) - 0.5  # scaled by a third
    assert torch.allclose(pixels[0, 20, 1:-1], expected[1:-1], atol=1)


def test_pixels_span_minus_one_to_one_and_enlarging_works():
    image = Image.new("RGB", (4, 4), (0, 128, 255))
    pixels, _ = data.crop_and_resize(image, 16, True, False, torch.Generator())
    assert pixels[:, 8, 8].tolist() == [-1, pytest.approx(128 / 127.5 - 1, abs=1e-6), 1]


def _palette(transparent):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return Image.open(io.BytesIO(encoded(image, transparency=bytes([255, 0 if transparent else 255]))))


def _sixteen_bit(mode, value):
    return Image.frombytes(mode, (20, 20), np.full(400, value, ">u2" if mode == "I;16B" else "<u2").tobytes())


MODES = {
    "RGB": (lambda: Image.new("RGB", (20, 20), (200, 100, 50)), (200, 100, 50)),
    "L": (lambda: Image.new("L", (20, 20), 77), (77,) * 3),
    "1": (lambda: Image.new("1", (20, 20), 1), (255,) * 3),
    "LA": (lambda: Image.new("LA", (20, 20), (0, 51)), (204,) * 3),
    "RGBA opaque": (lambda: Image.new("RGBA", (20, 20), (200, 100, 50, 255)), (200, 100, 50)),
    "RGBA clear": (lambda: Image.new("RGBA", (20, 20), (200, 100, 50, 0)), (255,) * 3),
    "RGBA half": (lambda: Image.new("RGBA", (20, 20), (255, 0, 0, 51)), (255, 204, 204)),
    "P": (lambda: _palette(False), (200, 100, 50)),
    "P clear": (lambda: _palette(True), (255,) * 3),
    "RGB with a clear colour": (
        lambda: Image.open(io.BytesIO(encoded(Image.new("RGB", (20, 20), (9, 8, 7)), transparency=(9, 8, 7)))),
        (255,) * 3,
    ),
    "CMYK": (lambda: Image.new("CMYK", (20, 20), (0, 255, 255, 0)), (255, 0, 0)),
    "YCbCr": (lambda: Image.new("YCbCr", (20, 20), (77, 128, 128)), (77,) * 3),
    "I;16": (lambda: _sixteen_bit("I;16", 200 * 257), (200,) * 3),
    "I;16B": (lambda: _sixteen_bit("I;16B", 200 * 257), (200,) * 3),
    "I": (lambda: Image.new("I", (20, 20), 100 * 257), (100,) * 3),
    "16-bit PNG": (lambda: Image.open(io.BytesIO(encoded(_sixteen_bit("I;16", 50 * 257)))), (50,) * 3),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    make, colour = MODES[mode]
    pixels, _ = crop(make())
    assert pixels[:, 8, 8].round().tolist() == list(colour)
    assert float((pixels - pixels[:, :1, :1]).abs().max()) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = position_image(40, 24)
    turn = Image.Transpose
    stored_as = {
        1: None,
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }[orientation]
    stored = upright if stored_as is None else upright.transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, time_ids = crop(Image.open(io.BytesIO(encoded(stored, exif=exif))), 24)
    assert time_ids == (24, 40, 0, 8, 24, 24)
    assert torch.equal(pixels, crop(upright, 24)[0])


def test_pictures_that_cannot_be_judged_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        crop(Image.new("F", (20, 20)))
    with pytest.raises(ValueError, match="1 x 60000, too narrow"):
        crop(Image.new("L", (1, 60000)), 64)


def test_geometry_equals_torchvision():
    from torchvision import transforms

    rng = np.random.default_rng(0)
    for size in ((37, 91), (91, 37), (50, 33), (20, 21)):
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
        reference = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor()])
        assert torch.allclose(crop(image, 32)[0] / 255, reference(image), atol=1e-6)


# -------------------------------------------------------------------------------------------------------- THE CACHE
def texts(count):
    return [f"caption {n}" for n in range(count)]


@pytest.fixture
def five(tmp_path):
    return dataset_of([position_image(40 + n, 24) for n in range(5)], texts(5))


def test_the_second_call_encodes_nothing(tmp_path, five):
    first, encoders = cache(tmp_path, five)
    assert encoders.images == 5 and encoders.prompts == texts(5)
    second, unused = cache(tmp_path, five, batch_size=3)
    assert unused.images == 0 and not unused.prompts
    for row in range(5):
        a, b = first[row, 0], second[row, 0]
        assert all(torch.equal(a[name], b[name]) for name in a if isinstance(a[name], torch.Tensor))


# What changed, and whether images and texts must be encoded again.
KEY_CHANGES = {
    "resolution": ({"resolution": 8}, True, False),
    "center_crop": ({"center_crop": True}, True, False),
    "random_flip": ({"random_flip": False}, True, False),
    "seed": ({"seed": 1}, True, False),
    "dtype": ({"dtype": torch.float16}, True, True),
    "model": ({"key": {"model": "other"}}, True, True),
    "vae": ({"key": {"model": "m", "vae": "v"}}, True, False),
    "text encoder": ({"key": {"model": "m", "text_encoder": "t"}}, False, True),
    "caption column": ({"caption_column": "other"}, False, True),
    "image column": ({"image_column": "second"}, True, False),
    "batch size": ({"batch_size": 5}, False, False),
}


@pytest.mark.parametrize("name", KEY_CHANGES)
def test_a_change_encodes_again_exactly_what_it_shapes(tmp_path, five, name):
    changes, images, prompts = KEY_CHANGES[name]
    five = five.add_column("other", [f"other {n}" for n in range(5)]).add_column("second", five["image"][:])
    cache(tmp_path, five)
    _, encoders = cache(tmp_path, five, **changes)
    assert (encoders.images > 0, len(encoders.prompts) > 0) == (images, prompts)


def test_the_seed_shapes_nothing_when_nothing_is_random(tmp_path, five):
    cache(tmp_path, five, center_crop=True, random_flip=False)
    _, encoders = cache(tmp_path, five, center_crop=True, random_flip=False, seed=1)
    assert encoders.images == 0


def test_other_rows_are_another_cache(tmp_path, five):
    cache(tmp_path, five)
    cached, encoders = cache(tmp_path, five.select([1, 3]))
    assert encoders.images == 2 and cached[1, 0]["caption"] == "caption 3"


def _later(path):
    """Give a file just written a time of its own, whatever the file system's resolution."""
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 10**9))


def _change_folder_image(folder):
    picture(9).save(folder / "1.png")
    _later(folder / "1.png")


def _change_parquet(folder):
    _parquet(folder, image=[encoded(picture(n)) for n in (0, 9, 2)])
    _later(folder / "train.parquet")


def _change_path_image(folder):
    picture(9).save(folder / "images" / "1.png")
    _later(folder / "images" / "1.png")


def _save_with_one_fingerprint(folder, numbers):
    """As a generator function does that reads other files from one day to the next."""
    shutil.rmtree(folder, ignore_errors=True)
    made = dataset_of([picture(n) for n in numbers], ["c0", "c1", "c2"]).cast_column("image", datasets.Image())
    made._fingerprint = "0123456789abcdef"
    made.save_to_disk(str(folder))
    return {"dataset_name": folder}


CHANGED_FILES = {
    "image folder": (KINDS["train_data_dir"], _change_folder_image),
    "image folder by name": (KINDS["image folder by name"], _change_folder_image),
    "parquet": (KINDS["parquet file of bytes"], _change_parquet),
    "files that a parquet names": (KINDS["parquet file of paths"], _change_path_image),
    "saved": (
        lambda d: _save_with_one_fingerprint(d, (0, 1, 2)),
        lambda d: _save_with_one_fingerprint(d, (0, 9, 2)),
    ),
}


@pytest.mark.parametrize("kind", CHANGED_FILES)
def test_a_changed_file_is_encoded_again(tmp_path, kind):
    make, change = CHANGED_FILES[kind]
    options = {name: str(value) for name, value in make(tmp_path / "data").items()}

    def red(changes=options):
        cached, encoders = cache(tmp_path, load(tmp_path, **changes))
        return round(float(cached[1, 0]["latents"][0, 0, 0] + 1) * 127.5), encoders

    assert red()[0] == 10
    assert red()[1].images == 0
    change(tmp_path / "data")
    value, encoders = red()
    assert value == 90 and encoders.images == 3 and not encoders.prompts


def test_crops_do_not_depend_on_the_batch_size(tmp_path, five):
    a, _ = cache(tmp_path / "a", five, batch_size=1)
    b, _ = cache(tmp_path / "b", five, batch_size=4)
    for row in range(5):
        assert torch.equal(a[row, 0]["latents"], b[row, 0]["latents"])
        assert torch.equal(a[row, 0]["time_ids"], b[row, 0]["time_ids"])
    assert len({tuple(a[row, 0]["time_ids"].tolist()[2:4]) for row in range(5)}) > 1


def test_stored_time_ids_are_those_of_the_stored_latent(tmp_path):
    cached, _ = cache(tmp_path, dataset_of([position_image(80, 16)] * 12, texts(12)), center_crop=False)
    flips = set()
    for row in range(12):
        item = cached[row, 0]
        x = ((item["latents"][0] + 1) * 127.5).round()[0]
        left = item["time_ids"][3] + torch.arange(16)
        flipped = bool(x[0] > x[1])
        flips.add(flipped)
        assert torch.equal(x, 79 - left if flipped else left)
    assert flips == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stored_row_is_the_encoders_output_in_dtype(tmp_path, five, dtype):
    cached, encoders = cache(tmp_path, five, dtype=dtype, center_crop=True, random_flip=False)
    item = cached[4, 17]
    pixels, time_ids = data.crop_and_resize(position_image(44, 24), 16, True, False, torch.Generator())
    embeds, pooled = encoders.encode_prompts(["caption 4"])
    assert torch.equal(item["latents"], torch.cat([pixels, pixels[:1]]).to(dtype))
    assert torch.equal(item["prompt_embeds"], embeds[0].to(dtype)) and item["prompt_embeds"].shape == (77, 8)
    assert torch.equal(item["pooled_prompt_embeds"], pooled[0].to(dtype))
    assert item["time_ids"].dtype == torch.float32 and item["time_ids"].tolist() == list(map(float, time_ids))
    assert item["caption"] == "caption 4" and item["draw"] == 17


def test_a_caption_is_encoded_once_and_a_list_offers_a_choice(tmp_path):
    captions = [["a", "b", "c"], ["b"], ["c", "a"], ["d", "d"]]
    dataset = dataset_of([picture(n) for n in range(4)], captions)
    cached, encoders = cache(tmp_path, dataset, batch_size=3)
    assert encoders.prompts == ["a", "b", "c", "d"]
    chosen = Counter(cached[0, draw]["caption"] for draw in range(300))
    assert set(chosen) == {"a", "b", "c"} and min(chosen.values()) > 60
    for draw in range(20):
        item = cached[0, draw]
        assert item["caption"] == cached[0, draw]["caption"]
        assert torch.equal(item["pooled_prompt_embeds"], encoders.encode_prompts([item["caption"]])[1][0])
    other, unused = cache(tmp_path, dataset, seed=1)
    assert not unused.prompts
    assert [other[0, d]["caption"] for d in range(20)] != [cached[0, d]["caption"] for d in range(20)]


def test_cached_data_survives_pickling(tmp_path, five):
    cached, _ = cache(tmp_path, five)
    assert torch.equal(pickle.loads(pickle.dumps(cached))[2, 1]["latents"], cached[2, 1]["latents"])
    assert len(pickle.dumps(cached)) < 100_000


DAMAGED = {
    "no image at all": b"hello",
    "empty": b"",
    "cut short": encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900],
    "broken chunk": encoded(position_image(40, 40)).replace(b"IDAT", b"IDAX"),
    "narrow": encoded(Image.new("L", (1, 60000)), "PNG"),
    "float": encoded(Image.new("F", (16, 16)), "TIFF"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_image_is_named(tmp_path, damage):
    dataset = dataset_of([picture(0), picture(1), DAMAGED[damage]], texts(3))
    with pytest.raises(UserError, match="--image_column 'image': the image in row 2 of the data set cannot be read"):
        cache(tmp_path, dataset, resolution=64)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_missing_image_is_named(tmp_path):
    folder = image_folder(tmp_path / "d", texts(3))
    (folder / "1.png").unlink()
    with pytest.raises(UserError, match=r"row 1 of the data set \('.*1.png'\) cannot be read.*No such file"):
        cache(tmp_path, load(tmp_path, train_data_dir=str(folder)))
    rows = {"image": [{"bytes": encoded(picture(0)), "path": None}, None], "text": texts(2)}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    with pytest.raises(UserError, match="--image_column 'image' holds no image in row 1"):
        cache(tmp_path, dataset)


def test_values_that_are_not_finite_are_refused(tmp_path, five):
    encoders = Encoders()
    encoders.encode_images = lambda pixels: torch.full((len(pixels), 4, 2, 2), 1e6)
    with pytest.raises(UserError, match=r"--mixed_precision: encoding images.*--pretrained_vae"):
        cache(tmp_path, five, encoders, dtype=torch.float16)


def test_a_cache_folder_that_takes_no_files_is_named(tmp_path, five):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir: the cache cannot be written"):
        cache(tmp_path, five, cache_dir=str(tmp_path / "file"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_named():
    schema = {"column": data.pa.binary()}
    with (
        pytest.raises(UserError, match=r"--cache_dir.*free space"),
        data._ArrowFile(Path("/dev/full"), schema, 1) as file,
    ):
        file.add({"column": b"x" * 2**20})


class Fatal(Encoders):
    """Dies, uncleanly, in its second batch."""

    def __init__(self, during):
        super().__init__()
        self.during = during

    def encode_images(self, pixels):
        if self.during == "images" and self.images:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_images(pixels)

    def encode_prompts(self, prompts):
        if self.during == "prompts" and self.prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_prompts(prompts)


@pytest.mark.parametrize("during", ["images", "prompts"])
def test_a_killed_run_leaves_no_cache(tmp_path, five, during):
    child = FORK.Process(target=cache, args=(tmp_path, five, Fatal(during)))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert list(tmp_path.rglob("*.partial"))
    cached, encoders = cache(tmp_path, five)
    assert encoders.images == (5 if during == "images" else 0) and len(encoders.prompts) == 5
    assert [cached[row, 0]["caption"] for row in range(5)] == texts(5)
    assert not list(tmp_path.rglob("*.partial"))


def _cache_and_count(tmp_path, dataset, barrier, queue):
    barrier.wait()
    cached, encoders = cache(tmp_path, dataset)
    queue.put((encoders.images, len(encoders.prompts), float(cached[4, 0]["latents"].sum())))


def test_of_two_processes_at_once_one_encodes(tmp_path, five):
    barrier, queue = FORK.Barrier(2), FORK.Queue()
    children = [FORK.Process(target=_cache_and_count, args=(tmp_path, five, barrier, queue)) for _ in range(2)]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    assert sum(images for images, *_ in results) == 5 and sum(prompts for _, prompts, _ in results) == 5
    assert results[0][2] == results[1][2]


def _private_mib():
    """This process's own memory, memory-mapped files aside."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory use from /proc")
def test_memory_stays_bounded_while_hundreds_of_megabytes_pass(tmp_path):
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)))
    rows = 1000
    with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "big.arrow"), writer_batch_size=50) as writer:
        for row in range(rows):
            writer.write({"image": {"bytes": noise, "path": None}, "text": f"caption {row}"})
        writer.finalize()
    dataset = datasets.Dataset.from_file(str(tmp_path / "big.arrow"))
    usage = []

    class Heavy(Encoders):
        def encode_images(self, pixels):
            usage.append(_private_mib())
            return torch.zeros(len(pixels), 4, 100, 100)

        def encode_prompts(self, prompts):
            usage.append(_private_mib())
            return torch.zeros(len(prompts), 77, 1024), torch.zeros(len(prompts), 64)

    gc.collect()
    before = _private_mib()
    cached, _ = cache(tmp_path, dataset, Heavy(), batch_size=8)
    for row in range(0, rows, 7):
        cached[row, row]
        usage.append(_private_mib())
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*.arrow")) / 2**20
    shutil.rmtree(tmp_path)  # pytest would keep it for three runs
    assert stored > 500
    assert max(usage) - before < 150


# ------------------------------------------------------------------------------------------------ DRAWS AND BATCHES
def sampler(num_rows, batch_size=1, rank=0, world_size=1, accumulation_steps=1, seed=0, start_step=0, num_steps=10):
    return DrawSampler(
        num_rows,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        accumulation_steps=accumulation_steps,
        seed=seed,
        start_step=start_step,
        num_steps=num_steps,
    )


def test_every_epoch_shows_every_row_once_and_batches_straddle_epochs():
    draws = [draw for batch in sampler(7, batch_size=4, num_steps=14) for draw in batch]
    assert [number for _, number in draws] == list(range(56))
    epochs = [tuple(row for row, _ in draws[start : start + 7]) for start in range(0, 56, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_a_step_may_hold_several_epochs():
    batches = list(sampler(3, batch_size=8, num_steps=2))
    assert [len(batch) for batch in batches] == [8, 8]
    assert Counter(row for batch in batches for row, _ in batch).most_common()[-1][1] == 5


def step_sets(num_steps=5, **options):
    """The set of draws of every optimizer step, over all ranks."""
    world_size, accumulation = options.get("world_size", 1), options.get("accumulation_steps", 1)
    steps = [set() for _ in range(num_steps)]
    for rank in range(world_size):
        for number, batch in enumerate(sampler(11, rank=rank, num_steps=num_steps, **options)):
            steps[number // accumulation].update(batch)
    return steps


def test_the_draws_of_a_step_depend_on_their_number_alone():
    expected = step_sets(batch_size=8)
    assert all(len(step) == 8 for step in expected)
    for batch_size, accumulation, world_size in ((1, 8, 1), (2, 4, 1), (1, 4, 2), (4, 1, 2), (1, 1, 8), (2, 2, 2)):
        options = {"batch_size": batch_size, "accumulation_steps": accumulation, "world_size": world_size}
        assert step_sets(**options) == expected


def test_a_resumed_sampler_yields_the_remaining_batches():
    options = {"batch_size": 3, "accumulation_steps": 2, "world_size": 2, "rank": 1, "num_steps": 9}
    whole = list(sampler(5, **options))
    for start in (0, 4, 9):
        rest = sampler(5, start_step=start, **options)
        assert list(rest) == whole[2 * start :] and len(rest) == 2 * (9 - start)


def test_generators_are_stable_and_independent():
    # Written down once: a resumed run must draw the same numbers in another process and under another version.
    assert draw_generator(0, 0, "noise").initial_seed() == 7012560265599635137
    seeds = {draw_generator(s, d, name).initial_seed() for s in range(3) for d in range(500) for name in "ab"}
    assert len(seeds) == 3000
    a, b, c = (torch.randn(20_000, generator=draw_generator(*key)) for key in ((0, 1, "a"), (0, 1, "b"), (0, 2, "a")))
    for x, y in ((a, b), (a, c), (b, c)):
        assert abs(float((x * y).mean())) < 4 / 20_000**0.5
    first = torch.cat([torch.randn(1, generator=draw_generator(0, draw, "a")) for draw in range(2000)])
    assert abs(float(first.mean())) < 0.1 and abs(float(first.std()) - 1) < 0.1


def test_workers_change_nothing(tmp_path):
    dataset = dataset_of([picture(n) for n in range(5)], [["x", "y", f"z{n}"] for n in range(5)])
    cached, _ = cache(tmp_path, dataset)
    batches = {}
    for workers in (0, 2):
        loader = DataLoader(
            cached, batch_sampler=sampler(5, 3, num_steps=6), collate_fn=data.collate, num_workers=workers
        )
        batches[workers] = list(loader)
    assert len(batches[0]) == 6
    for one, two in zip(batches[0], batches[2], strict=True):
        assert one.keys() == two.keys() and one["caption"] == two["caption"]
        assert all(torch.equal(one[name], two[name]) for name in one if name != "caption")
    batch = batches[0][0]
    assert batch["draw"].dtype == torch.int64 and batch["draw"].tolist() == [0, 1, 2]
    assert batch["latents"].shape == (3, 4, 16, 16) and batch["time_ids"].shape == (3, 6)
    assert batch["prompt_embeds"].shape == (3, 77, 8) and batch["pooled_prompt_embeds"].shape == (3, 4)


def test_importing_the_module_loads_no_model_library():
    code = "import sharpening.data, sys; print([m for m in ('transformers', 'diffusers') if m in sys.modules])"
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
