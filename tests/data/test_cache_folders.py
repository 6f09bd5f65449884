"""Cache folders: filled once, whole or not at all; a disk that takes no more is named."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from sharpening.data import cache_folders
from sharpening.data.cache_folders import ArrowFile, cache_folder
from sharpening.errors import UserError


def test_a_folder_is_filled_once_and_again_for_other_parts(tmp_path):
    filled = []

    def fill(folder):
        filled.append(folder)
        (folder / "rows").write_text("x")
        return {"rows": [1]}

    first = cache_folder(tmp_path, "latents", {"model": "a"}, fill)
    assert cache_folder(tmp_path, "latents", {"model": "a"}, fill) == first and len(filled) == 1
    assert sorted(path.name for path in first.iterdir()) == ["about.json", "rows"]
    assert cache_folder(tmp_path, "latents", {"model": "b"}, fill) != first and len(filled) == 2


def test_a_failure_leaves_no_folder(tmp_path):
    def fill(folder):
        (folder / "rows").write_text("x")
        raise RuntimeError("the encoder failed")

    with pytest.raises(RuntimeError, match="the encoder failed"):
        cache_folder(tmp_path, "latents", {}, fill)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_named():
    schema = {"column": pa.binary()}
    with (
        pytest.raises(UserError, match=r"--cache_dir.*free space"),
        ArrowFile(Path("/dev/full"), schema, 1) as file,
    ):
        file.add({"column": b"x" * 2**20})


DAMAGE = {
    "cut": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: data[:1000] + bytes(100) + data[1100:],
    "zeroed at the end": lambda data: data[:-50] + bytes(50),
    "empty": lambda data: b"",
    "gone": lambda data: None,
}


@pytest.mark.parametrize("name", ["rows", "about.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_said_and_filled_again(damage, name, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(cache_folders, "CHUNK", 300)  # so that there are many
    data = bytes(range(1, 251)) * 10
    filled = []

    def fill(folder):
        filled.append(folder)
        (folder / "rows").write_bytes(data)
        return {"rows": [1]}

    def get():
        return cache_folder(tmp_path, "latents", {"model": "a" * 2000}, fill)

    folder = get()
    whole = (folder / "about.json").read_bytes()
    assert get() == folder and len(filled) == 1 and not caplog.records
    damaged = DAMAGE[damage]((folder / name).read_bytes())
    if damaged is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damaged)
    assert get() == folder and len(filled) == 2
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"the cache {folder} is damaged (") and said.endswith("and is made anew") and name in said
    assert (folder / "rows").read_bytes() == data and (folder / "about.json").read_bytes() == whole
    assert get() == folder and len(filled) == 2


def test_of_a_large_file_some_chunks_from_end_to_end_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_folders, "CHUNK", 10)
    monkeypatch.setattr(cache_folders, "CHECKED_CHUNKS", 4)
    filled = []

    def fill(folder):
        filled.append(folder)
        (folder / "rows").write_bytes(bytes(1000))
        return {}

    def filled_after(chunk):
        with (cache_folder(tmp_path, "latents", {}, fill) / "rows").open("r+b") as file:
            file.seek(10 * chunk)
            file.write(b"x")
        cache_folder(tmp_path, "latents", {}, fill)
        return len(filled)

    assert [filled_after(chunk) for chunk in (1, 0, 25, 50, 75, 76)] == [1, 2, 3, 4, 5, 5]


def test_a_file_that_grows_too_large_leaves_no_folder_and_is_named(tmp_path, file_limit):
    schema = {"column": pa.binary()}

    def fill(folder):
        with ArrowFile(folder / "rows.arrow", schema, 1) as file:
            for _ in range(10):
                file.add({"column": b"x" * 2**16})
        return {}

    with file_limit(2**18), pytest.raises(UserError, match=r"--cache_dir: .*File too large.*; free space"):
        cache_folder(tmp_path, "latents", {}, fill)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert cache_folder(tmp_path, "latents", {}, fill).is_dir()
