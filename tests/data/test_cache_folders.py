"""Cache folders: filled once, whole or not at all; a disk that takes no more is named."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

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
