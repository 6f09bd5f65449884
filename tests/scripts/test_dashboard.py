"""`scripts/dashboard.py`: runs compared by their metrics.jsonl alone, as a page that needs no network."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest
from PIL import Image

from sharpening.errors import exit_status
from sharpening.running import dashboard
from tests.support.runs import ROOT


@pytest.fixture(scope="module")
def command():
    """The script in this process: a command line to its exit status."""
    spec = importlib.util.spec_from_file_location("dashboard_script", ROOT / "scripts" / "dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: exit_status(lambda: module.main([str(word) for word in words]))


def write_run(folder, steps=40, cost=True, gain=0.01, **curves):
    """A run's metrics, as a run writes them; curves are functions of the step."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {
                "step": step, "reward/mean": 0.5 + gain * step, "reward/spread": 0.2, "reward/best": 0.9,
                "reward/worst": 0.1, "reward/tie_rate": 0.0, "loss": 1 / step, "grad_norm": 2.0, "lr": 1e-4,
                "preference/accuracy": 0.6, "preference/log_ratio_best": -0.01 * step,
                "preference/log_ratio_worst": -0.02 * step, "preference/kl": 1e-4 * step, "peak_memory_gib": 1.5,
                "samples_per_second": 10.0, **{name: of(step) for name, of in curves.items()},
            }  # fmt: skip
            if cost:
                line |= {"cost/forwards": 432 * step, "cost/seconds": 2.5 * step, "cost/images_judged": 48 * step}
                line |= {f"time/{phase}": 0.5 for phase in ("generation", "score", "train", "other")}
                line |= {"time/step": 2.5, "time/reference": 0.5, "time/validation": 0.0}
            if step % 10 == 0:
                line |= {"validation/reward": 0.5 + gain * step, "validation/reward_standard_error": 0.02}
            file.write(json.dumps(line) + "\n")
    return folder


DAMAGE = {
    "missing": (None, ["holds no metrics.jsonl", "--output_dir"]),
    "empty": ("", ["has no finished step"]),
    "only a cut line": ('{"step": 1, "rew', ["has no finished step"]),
    "cut in the middle": ('{"step": 1}\n{"step": 2, "re\n{"step": 3}\n', ["damaged in line 2"]),
    "not of a run": ('{"name": "x"}\n{"step": 2}\n', ["damaged in line 1"]),
    "a list": ('[1]\n{"step": 2}\n', ["damaged in line 1"]),
    "words for numbers": ('{"step": 1, "loss": "low"}\n{"step": 2}\n', ["damaged in line 1"]),
    "no text": (b"\xff\xfe\x00", ["cannot be read"]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_metrics_are_answered_by_one_sentence(kind, command, tmp_path, capsys):
    content, words = DAMAGE[kind]
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "metrics.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert command(run, "--output", tmp_path / "page.html") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(run) in error and all(word in error for word in words)
    assert not (tmp_path / "page.html").exists()


def test_run_under_way_is_read_up_to_its_last_whole_line(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/mean": 0.')
    read = dashboard.read_run(run)
    assert read.steps == 3 and read.values["reward/mean"] == pytest.approx([0.51, 0.52, 0.53])
    assert read.values["train/loss"][0] == 1 and "loss" not in read.values
    assert dashboard.read_run(run / "metrics.jsonl") == read


def test_long_runs_become_means_of_neighbours(tmp_path):
    run = write_run(tmp_path / "run", steps=4000, gain=0, loss=lambda step: step % 2, lr=lambda step: math.nan)
    page = dashboard.page_data(dashboard.read_runs([run]), "steps")
    (first,) = page["runs"]
    assert len(first["axes"]["steps"]) == len(first["curves"]["train/loss"]) == 1334
    assert first["axes"]["steps"][:2] == [3, 6] and first["axes"]["steps"][-1] == first["facts"]["steps"] == 4000
    assert first["curves"]["train/loss"][:2] == pytest.approx([2 / 3, 1 / 3], abs=1e-5)
    json.dumps(page, allow_nan=False)


def test_runs_are_named_by_what_tells_them_apart(command, tmp_path, capsys):
    """Both quickstarts write a folder `run`."""
    runs = [write_run(tmp_path / name, steps=1) for name in ("sft/run", "rlhf/run", "other")]
    assert [run.name for run in dashboard.read_runs(runs)] == ["sft/run", "rlhf/run", "other"]
    assert command(runs[0], runs[0] / "metrics.jsonl", "--output", tmp_path / "page.html") == 2
    assert "sft/run is named twice" in capsys.readouterr().err


def test_page_needs_no_torch(tmp_path):
    run = write_run(tmp_path / "run")
    code = "import runpy, sys\nsys.argv = sys.argv[1:]\n"
    code += (
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nfinally:\n    assert 'torch' not in sys.modules"
    )
    words = [ROOT / "scripts" / "dashboard.py", run, "--output", tmp_path / "page.html"]
    result = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"written: {tmp_path / 'page.html'}\n"


def test_picture_draws_the_curves_that_it_is_told(command, tmp_path, capsys):
    new, old = write_run(tmp_path / "new"), write_run(tmp_path / "old", cost=False, gain=0.005)
    words = ["--output", tmp_path / "page.html", "--picture", tmp_path / "some.png"]
    assert command(new, old, *words) == 0
    assert command(new, *words, "--curves", "reward/mean", "preference/log ratio", "--against", "forwards") == 0
    with Image.open(tmp_path / "some.png") as image:
        assert image.width > 400
    assert command(new, *words, "--curves", "reward/meen") == 2
    assert "--curves reward/meen: no run has it; there are " in capsys.readouterr().err
    assert command(new, *words[:2], "--curves", "reward/mean") == 2
    assert "--curves are those of --picture; add it" in capsys.readouterr().err
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert command(tmp_path / "bare", *words) == 2
    assert "name some by --curves" in capsys.readouterr().err
    assert command(new, old, *words, "--against", "forwards") == 2
    assert "old has no cost/forwards; choose --against steps" in capsys.readouterr().err


def drawn(page, title):
    """The curves of a chart as their paths, by the number of the run."""
    card = page.locator(".card", has=page.get_by_role("heading", name=title))
    return {curve.get_attribute("data-run"): curve.get_attribute("d") for curve in card.locator(".curve").all()}


def test_page_in_a_browser(command, visit, tmp_path):
    """Opens without an error or a request, changes its axis, switches a run off, smooths, and says values."""
    wild = {"reward/component/</script><b>x": lambda step: step}  # a reward may be called anything
    runs = [
        write_run(tmp_path / "good", **wild), write_run(tmp_path / "bad", gain=-0.01),
        write_run(tmp_path / "<b>old", cost=False, gain=0.0),
    ]  # fmt: skip
    assert command(*runs, "--output", tmp_path / "page.html") == 0
    tab = visit(tmp_path / "page.html")
    page = tab.page
    before = drawn(page, "reward/mean")
    assert before.keys() == {"0", "1", "2"} and len(drawn(page, "preference/log ratio (dashed: worst)")) == 3
    assert page.locator("text=phases of a step").count() == 1
    assert "Always 0, so not drawn: reward/tie_rate" in page.locator("footer").inner_text()
    rows = page.locator("#facts tbody tr").all_inner_texts()
    assert [row.split("\t")[:5] for row in rows] == [
        ["good", "40", "17.28k", "1920", "100"], ["bad", "40", "17.28k", "1920", "100"],
        ["<b>old", "40", "-", "-", "-"],
    ]  # fmt: skip

    page.locator(".axes button", has_text="forwards").click()
    assert drawn(page, "reward/mean").keys() == {"0", "1"}
    note = page.locator("#absent")
    assert note.is_visible() and "against forwards" in note.inner_text() and "<b>old" in note.inner_text()
    assert "forwards, 3 for a row" in page.locator(".card svg").first.inner_html()

    page.locator(".runs button", has_text="bad").click()
    assert drawn(page, "reward/mean").keys() == {"0"}
    assert page.locator("#facts tbody tr:visible").count() == 2
    page.locator(".runs button", has_text="bad").click()
    assert drawn(page, "reward/mean").keys() == {"0", "1"}

    soft = drawn(page, "train/loss")
    page.locator("#smoothing").fill("0")
    assert drawn(page, "train/loss")["0"] != soft["0"]
    chart = page.locator(".card", has=page.get_by_role("heading", name="reward/mean"))
    size = chart.locator("svg").bounding_box()
    chart.locator("svg").hover(position={"x": size["width"] - 11, "y": 40})
    said = chart.locator(".tip").inner_text().splitlines()
    assert said == ["forwards 17.28k", "good: 0.9 ± 0.2", "bad: 0.1 ± 0.2"]
    assert tab.errors == [] and tab.requests == []

    narrow = visit(tmp_path / "page.html", width=400, dark=True)
    assert narrow.page.evaluate("document.documentElement.scrollWidth") == 400
    assert narrow.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 13, 13)"
    assert len(drawn(narrow.page, "reward/mean")) == 3 and narrow.errors == [] and narrow.requests == []


def test_many_long_runs_are_drawn(command, visit, tmp_path):
    """More points in a chart than a function of JavaScript may have arguments."""
    runs = [write_run(tmp_path / f"run{number}", steps=1500, cost=False) for number in range(45)]
    assert command(*runs, "--output", tmp_path / "page.html") == 0
    tab = visit(tmp_path / "page.html")
    assert len(drawn(tab.page, "reward/mean")) == 45 and tab.errors == []
