"""Throughput of the rewards."""

import json

import pytest

from benchmarks import rewards
from sharpening.errors import UserError


def test_batches_are_set_against_one_image_at_a_time(tmp_path, capsys):
    output = tmp_path / "rewards.json"
    few = ["--images", "4", "--resolution", "32", "--rounds", "2", "--batch_sizes", "1", "4", "--device", "cpu"]
    assert rewards.main(["--rewards", "shapes", "jpeg_compressibility", *few, "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]
    assert [result["reward"] for result in results] == ["shapes", "jpeg_compressibility"]
    for result in results:
        assert {way: len(seconds) for way, seconds in result["seconds_per_image"].items()} == {
            "batch 1": 2, "batch 4": 2,
        }  # fmt: skip
    assert capsys.readouterr().out.count("batch 4") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds is 0, but it must be at least 1"),
        (["--batch_sizes", "8", "0"], "--batch_sizes has 0, but it must be at least 1"),
    ],
)
def test_mistake_is_told_in_one_sentence(flags, message):
    with pytest.raises(UserError, match=message):
        rewards.main(flags)
