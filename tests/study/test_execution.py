"""The command of the study: what it refuses, and a rehearsal of all of it."""

import csv
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from sharpening.errors import UserError
from study import execution
from study.cost import decode_cost
from study.methods import METHODS
from study.settings import METRICS, Size
from tests.support.runs import ROOT, metrics


@pytest.mark.parametrize(
    ("flags", "words"), [(["--jobs", "0"], "--jobs is 0"), (["--quik"], "--quik")], ids=["no job", "unknown flag"]
)
def test_bad_flags_are_refused(flags, words):
    with pytest.raises(UserError) as refusal:
        execution.main(flags)
    assert words in str(refusal.value)


def test_a_folder_of_another_size_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(UserError, match=r"--output_dir .* holds a study of another size"):
        execution.main(["--quick", "--output_dir", str(tmp_path)])


def test_a_folder_in_which_another_study_writes_is_refused(tmp_path):
    size = Size()
    with (
        execution.study_folder(tmp_path, size),
        pytest.raises(UserError, match="another study is writing there"),
        execution.study_folder(tmp_path, size),
    ):
        pass
    with execution.study_folder(tmp_path, size):  # it has ended
        pass


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
@pytest.mark.timeout(1500)
def test_rehearsal_writes_every_table_and_figure_and_resumes(tmp_path):
    command = [sys.executable, "-m", "study", "--quick", "--output_dir", str(tmp_path / "study")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "study"
    tables = (out / "tables.md").read_text()
    assert re.findall("^## (.*)$", tables, re.MULTILINE) == [
        "Table 1: a compute of 1k",
        "Compute to a held-out reward of 0.90",
        "What was tried at a compute of 1k (9 images)",
        "SFT sharpening against standard fine-tuning",
        "SFT, branches n (m = 1)",
        "RLHF on samples, branches n (m = 1)",
        "SFT, steps m (n = 2)",
        "RLHF on samples, steps m (n = 2)",
        "What selection over noises does",
        "Figure 5: search at inference (9 images)",
    ]
    assert "nan" not in tables and tables in first.stdout
    summary = json.loads((out / "evaluation" / "search_demon" / "summary.json").read_text())
    assert summary["models"]["demon_2"]["nfe"] == 25 + 24 * 2
    assert "base" in summary["metrics"][METRICS["likeness"]]
    for name in ("figure4", "figure5", "figure6", "branches_and_steps", "reward_by_compute"):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
    page = (out / "gallery.html").read_text()
    for name in [*(path.name for path in out.glob("*.png")), *(path.name for path in (out / "tables").iterdir())]:
        assert name in page
    assert '<h2 id="figure6.png">Figure 6: the reward while training</h2>' in page
    with (out / "tables" / "table_1_a_compute_of_1k.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["base", *METHODS]
    decode = decode_cost()
    for row, method in zip(rows[1:], METHODS.values(), strict=True):
        setting = next(each for each in method.settings([1.0]) if each.words == row["setting"])
        run = out / "runs" / f"{method.name}_{setting.name}_1k_s0"
        last = metrics(run / "model")[-1]
        counted = last["cost/forwards"] + decode * last["cost/images_judged"]  # and none of its validation images
        assert float(row["compute"].rstrip("k")) == pytest.approx(counted / 1000, abs=0.06)
        assert 0.25 < float(row["compute"].rstrip("k")) < 4
    name = next(path.name for path in (out / "runs").glob("rlhf_efficient_*_1k_s0"))
    (out / "runs" / name / "finished.json").unlink()  # as if it had been interrupted
    markers = {path: path.stat().st_mtime_ns for path in out.glob("*/*/finished.json")}
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    again = {path.parent.name for path, then in markers.items() if path.stat().st_mtime_ns != then}
    assert again == {"tuning_1", "table1_1k_s0", "search_best_of_n"}  # evaluations of the run that was done again
    assert (out / "tables.md").read_text() == tables
