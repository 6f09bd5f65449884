"""`scripts/evaluate.py` on tiny pipelines: what it writes, prints and counts."""

import csv
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support.evaluation import PROMPTS, both
from tests.support.runs import ROOT
from tests.support.tiny_rewards import TINY


def test_a_model_does_not_differ_from_itself(evaluate, folder):
    metrics = evaluate(("base", folder / "model0"), ("same", folder / "model0"))["metrics"]["shapes"]
    assert metrics["same"]["gain"] == metrics["same"]["gain_standard_error"] == 0
    assert metrics["same"]["win_rate"] == metrics["same"]["win_low"] == metrics["same"]["win_high"] == 0.5
    assert metrics["base"]["gain"] is None and metrics["same"]["mean"] == metrics["base"]["mean"]


def test_summary_scores_and_table_agree(evaluate, folder, tmp_path, capsys):
    summary = evaluate(*both(folder), metrics=["jpeg_compressibility"], grid_images=18)
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [PROMPTS[0], PROMPTS[1]] * 2 + PROMPTS[:1]
    assert [int(row["seed"]) for row in rows] == list(range(1_000_000, 1_000_005))
    printed = capsys.readouterr().out
    for metric in ("shapes", "jpeg_compressibility"):
        ours, base = (np.array([float(row[f"{model}/{metric}"]) for row in rows]) for model in ("other", "base"))
        result = summary["metrics"][metric]["other"]
        assert result["mean"] == pytest.approx(ours.mean())
        assert result["standard_error"] == pytest.approx(ours.std(ddof=1) / 5**0.5)
        assert result["gain"] == pytest.approx((ours - base).mean())
        assert result["win_rate"] == pytest.approx((ours > base).mean() + 0.5 * (ours == base).mean())
        assert f"{result['gain']:+.4f}" in printed
    assert "shapes (trained on)" in printed and "jpeg_compressibility (trained on)" not in printed
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        listed = [(row["metric"], row["model"]) for row in csv.DictReader(file)]
    assert listed == [(spec, model) for spec in ("shapes", "jpeg_compressibility") for model in ("base", "other")]
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > 1000 and len(grid.convert("RGB").getcolors(1 << 24)) > 100


def test_prompts_may_hold_what_a_figure_would_take_for_a_formula(evaluate, folder, tmp_path):
    (tmp_path / "dollars.txt").write_text("a bill of $5^ beside $_$\n")
    prompts = tmp_path / "dollars.txt"
    evaluate(*both(folder), prompts=prompts, reward_model="jpeg_compressibility", num_images=1)
    assert (tmp_path / "out" / "report.html").is_file()


def test_metrics_of_t2i_compbench(evaluate, folder, tiny_blip_vqa, tiny_clip, tmp_path):
    blip_vqa, clip = f"blip_vqa:{tiny_blip_vqa}", f"clip_non_spatial:{TINY}/{tiny_clip[0]}"
    summary = evaluate(*both(folder), metrics=[blip_vqa, clip])
    again = evaluate(*both(folder), metrics=[blip_vqa, clip], output="again")
    for metric, low in ((blip_vqa, 0), (clip, -1)):
        assert again["metrics"][metric] == summary["metrics"][metric]
        with (tmp_path / "out" / "scores.csv").open(newline="") as file:
            column = [float(row[f"other/{metric}"]) for row in csv.DictReader(file)]
        assert len(set(column)) == 5 and low <= min(column) <= max(column) <= 1
        assert summary["metrics"][metric]["other"]["mean"] == pytest.approx(np.mean(column))


def test_spatial_and_complex_of_t2i_compbench(
    evaluate, folder, tiny_grounding_dino, tiny_blip_vqa, tiny_clip, tmp_path
):
    prompts = tmp_path / "related.txt"
    prompts.write_text("a cat next to a dog\nThe bird sat near the old tree.\n")
    models = {"t2i_complex_blip_vqa": tiny_blip_vqa, "t2i_complex_clip": f"{TINY}/{tiny_clip[0]}"}
    options = {"metrics": ["t2i_spatial", "t2i_complex"], "reward_model": "jpeg_compressibility", **models}
    summary = evaluate(*both(folder), prompts=prompts, detector=tiny_grounding_dino, **options)
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for metric in ("t2i_spatial", "t2i_complex"):
        column = [float(row[f"other/{metric}"]) for row in rows]
        assert len(set(column)) > 1 and -0.5 <= min(column) <= max(column) <= 1
        assert summary["metrics"][metric]["other"]["mean"] == pytest.approx(np.mean(column))


@pytest.mark.parametrize(("guidance", "rows"), [(1, 2), (3, 4)])
def test_nfe_is_the_number_of_unet_rows_of_an_image(guidance, rows, evaluate, folder):
    models = evaluate(*both(folder), guidance_scale=guidance)["models"]
    assert models["base"]["nfe"] == models["other"]["nfe"] == rows
    assert models["base"]["seconds"] > 0


@pytest.mark.parametrize("guidance", [0, 0.5])
def test_guidance_below_one_is_none_for_search_as_for_the_pipeline(guidance, evaluate, folder):
    model = folder / "model0"
    summary = evaluate(("base", model), ("one", f"{model}@best_of_n:1"), guidance_scale=guidance)
    assert summary["models"]["base"]["nfe"] == summary["models"]["one"]["nfe"] == 2
    assert summary["metrics"]["shapes"]["one"]["gain"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("guidance", [1, 3])
def test_search_is_a_sampler_like_any_other(guidance, evaluate, folder, tmp_path):
    """One candidate is the model itself; more cost what they say and are never worse in what they search for."""
    model, rows = folder / "model0", 2 if guidance == 1 else 4
    searches = {"one": "best_of_n:1", "four": "best_of_n:4", "smc": "smc:3:0.05", "zero": "zero_order:1:2:0.3"}
    models = [("base", model), *((name, f"{model}@{spec}") for name, spec in searches.items())]
    summary = evaluate(*models, guidance_scale=guidance)
    assert {name: entry["nfe"] / rows for name, entry in summary["models"].items()} == {
        "base": 1, "one": 1, "four": 4, "smc": 3, "zero": 3,
    }  # fmt: skip
    assert summary["models"]["four"]["search"] == "best_of_n:4" and summary["models"]["base"]["search"] is None
    metrics = summary["metrics"]["shapes"]
    folders = {name: next((tmp_path / "out" / "images").glob(f"{name}-*")) for name in ("base", "one")}
    for path in folders["base"].glob("*.png"):
        ours, theirs = (np.asarray(Image.open(f / path.name), int) for f in (folders["one"], folders["base"]))
        assert np.abs(ours - theirs).max() <= 1
    assert metrics["four"]["gain"] > 0 and metrics["zero"]["gain"] >= 0
    again = evaluate(*models, guidance_scale=guidance)
    assert again == summary


def test_what_a_search_found_for_one_reward_is_not_taken_for_another(evaluate, folder, tmp_path):
    reward = tmp_path / "mine.py"
    for sign in (1, -1):
        reward.write_text(f"def mine(images, prompts):\n    return {sign} * images.mean((1, 2, 3))  # {sign}\n")
        model = folder / "model0"
        summary = evaluate(("base", model), ("found", f"{model}@best_of_n:3"), reward_model=f"{reward}:mine")
        assert summary["metrics"][f"{reward}:mine"]["found"]["gain"] > 0
    assert len(list((tmp_path / "out" / "images").glob("found-*"))) == 2
    assert len(list((tmp_path / "out" / "images").glob("base-*"))) == 1


def test_reward_that_fails_is_one_sentence_and_keeps_the_images(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.py").write_text("def mine(images, prompts):\n    return images.mean((1, 2, 3)) / 0 * 0\n")
    flags = [f"--models=a={folder}/model0", f"--prompts={folder}/prompts.txt", f"--output_dir={tmp_path}/out"]
    flags += [f"--reward_model={tmp_path}/mine.py:mine", "--num_images=2", "--num_inference_steps=1"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and "the reward" in error and "--reward_failure=skip" in error
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 2
