"""Real files, real `datasets`: every form of captioned images, and what is refused."""

import shutil
from pathlib import Path

import datasets
import pytest
from PIL import Image

from sharpening.errors import UserError
from tests.support.captioned_files import (
    KINDS,
    cache,
    dataset_of,
    encoded,
    image_folder,
    image_parquet,
    load,
    parquet,
    picture,
    texts,
)

pytestmark = pytest.mark.usefixtures("no_progress_bars")


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
    "images that are numbers": (lambda d: {"dataset_name": parquet(d, image=[1, 2, 3])}, "--image_column.*int64"),
    "null caption": (
        lambda d: {"dataset_name": parquet(d, text=["a", None, "b"])},
        "--caption_column 'text' holds None.* in row 1 of",
    ),
    "blank caption": (lambda d: {"dataset_name": parquet(d, text=["a", "b", " "])}, "--caption_column.*row 2 of"),
    "numeric caption": (lambda d: {"dataset_name": parquet(d, text=[1, 2, 3])}, "--caption_column.*int 1 in row 0"),
    "empty list": (lambda d: {"dataset_name": parquet(d, text=[["a"], [], ["b"]])}, "--caption_column.*row 1 of"),
    "null in a list": (
        lambda d: {"dataset_name": parquet(d, text=[["a"], ["b", None], ["c"]])},
        "--caption_column.*row 1 of",
    ),
    "one column for both": (lambda d: FOLDER(d) | {"caption_column": "image"}, "--caption_column 'image'.*row 0"),
    "no rows": (lambda d: {"dataset_name": parquet(d, image=[], text=[])}, "--dataset_name.*no (rows|data)"),
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
    folder = str(image_parquet(tmp_path / "d"))

    def opened(*_, **__):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image, "open", opened)
    dataset = load(tmp_path, dataset_name=folder)
    assert isinstance(dataset[0]["image"]["bytes"], bytes)


def zeroed(data, begin, length):
    return data[:begin] + bytes(length) + data[begin + length :]


CUTS = {
    "cut": lambda data: data[:-200],
    "half": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: zeroed(data, len(data) // 2, 20_000),
    "lengths zeroed": lambda data: zeroed(data, data.index(b"caption 0caption 1") - 200, 100),
    "text zeroed": lambda data: zeroed(data, data.index(b"caption 5caption 6"), 30),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize(("damage", "file"), [*((damage, None) for damage in CUTS), ("half", "dataset_info.json")])
def test_a_damaged_cache_of_datasets_names_its_folder(tmp_path, damage, file):
    columns = {"image": [encoded(picture(n % 20)) for n in range(2000)], "text": texts(2000)}
    options = {"dataset_name": str(parquet(tmp_path / "data", **columns))}
    (cached,) = {entry["filename"] for entry in load(tmp_path, **options).cache_files}
    folder = Path(cached).parent
    path = folder / file if file else Path(cached)
    path.write_bytes(CUTS[damage](path.read_bytes()))
    why = {"lengths zeroed": "non-monotonic", "text zeroed": "zeros in the text"}.get(damage, "")
    with pytest.raises(
        UserError, match=f"^{folder}, where `datasets` keeps the data set, is damaged .*{why}.*; delete"
    ):
        load(tmp_path, **options)
    shutil.rmtree(folder)
    assert len(load(tmp_path, **options)) == 2000


@pytest.mark.usefixtures("no_progress_bars")
def test_a_cache_of_datasets_that_does_not_fit_is_named(tmp_path, file_limit):
    columns = {"image": [encoded(picture(n % 20)) for n in range(2000)], "text": texts(2000)}
    options = {"dataset_name": str(parquet(tmp_path / "data", **columns))}
    with file_limit(2**15), pytest.raises(UserError, match=r"--cache_dir: `datasets` cannot write its cache.*free"):
        load(tmp_path, **options)
    assert len(load(tmp_path, **options)) == 2000
