"""The study of the world of signs: its plan, and a rehearsal of all of it."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from study.signs import COMPARED, Size, Study
from tests.support.runs import ROOT
from tiny_world.make_shapes_dataset import write_dataset
from tiny_world.signs import parse, study_captions
from tiny_world.tiny_sdxl import build_random_sdxl


def test_methods_get_the_same_budget_on_prompts_that_are_not_judged(tmp_path):
    build_random_sdxl(tmp_path / "base" / "model", world="signs")
    write_dataset(tmp_path / "images", num_images=4, world="signs")
    (tmp_path / "prompts.txt").write_text("\n".join(study_captions()))
    runs = Study(Size(), tmp_path, decode=0.62).runs()
    assert set(runs) == set(COMPARED)
    for of_label in runs.values():
        assert [run.seed for run in of_label] == [0, 1, 2]
        assert 0.97 * 40_000 <= of_label[0].compute <= 40_000
        assert of_label[0].flags["reward_model"] == "tiny_world/read_number.py:ReadNumber"


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
@pytest.mark.timeout(900)
def test_rehearsal_writes_the_table_and_the_grid_and_resumes(tmp_path):
    out = tmp_path / "signs"
    command = [sys.executable, "-m", "study.signs", "--quick", "--jobs", "2", "--output_dir", str(out)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    table = (out / "table.md").read_text()
    rows = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    assert rows[:3] == ["method", "---", "base"] and set(rows[3:]) == set(COMPARED)
    assert "nan" not in table and table in first.stdout
    with Image.open(out / "grid.png") as picture:
        assert min(picture.size) > 100 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
    images = (json.loads(line)["text"] for line in (out / "images" / "metadata.jsonl").read_text().splitlines())
    trained_on = {parse(caption)[1] for caption in [*(out / "prompts.txt").read_text().splitlines(), *images]}
    judged = {parse(caption)[1] for caption in (out / "judged_prompts.txt").read_text().splitlines()}
    assert trained_on and judged and not trained_on & judged
    for folder in (out / "runs").iterdir():
        (trained,) = json.loads((folder / "finished.json").read_text())["commands"]
        data = {word.partition("=")[2] for word in trained if word.startswith(("--prompts_file", "--train_data_dir"))}
        assert data in ({str(out / "prompts.txt")}, {str(out / "images")})
    judging = json.loads((out / "evaluation" / "s0" / "finished.json").read_text())["commands"][0]
    assert judging[judging.index("--prompts") + 1] == str(out / "judged_prompts.txt")
    (out / "runs" / "dpo_s0" / "finished.json").unlink()  # as if it had been interrupted
    markers = {path: path.stat().st_mtime_ns for path in out.rglob("finished.json")}
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert {path.parent.name for path, then in markers.items() if path.stat().st_mtime_ns != then} == {"s0"}
    assert (out / "table.md").read_text() == table
