"""`scripts/evaluate.py` on tiny pipelines, and the statistics behind its table."""

import csv
import json
import math
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from scripts.evaluate import main
from sharpening import sdxl
from sharpening.errors import UserError
from sharpening.evaluation import comparison as evaluation
from sharpening.evaluation.prompt_sets import NAMES, PUBLISHED, load_prompt_set
from tests.support.runs import ROOT
from tests.support.tiny_rewards import TINY
from tiny_world.make_tiny_sdxl import build_random_sdxl

PROMPTS = ["a red circle on a white background", "a blue square on a gray background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    for seed in (0, 1):
        build_random_sdxl(folder / f"model{seed}", seed=seed)
    (folder / "prompts.txt").write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    return folder


@pytest.fixture
def evaluate(folder, tmp_path):
    def run(*models, output="out", prompts=folder / "prompts.txt", **options):
        flags = {"num_images": 5, "num_inference_steps": 2, "guidance_scale": 1, "batch_size": 2, "grid_images": 1}
        flags |= {"reward_model": "shapes", "output_dir": tmp_path / output, "prompts": prompts, **options}
        command = ["--models", *(f"{name}={path}" for name, path in models)]
        for name, value in flags.items():
            command += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
        assert main(command) == 0
        return json.loads((tmp_path / output / "summary.json").read_text())

    return run


def both(folder):
    return ("base", folder / "model0"), ("other", folder / "model1")


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


def test_images_are_those_of_the_stock_pipeline_whatever_the_batch(evaluate, folder, tmp_path):
    evaluate(*both(folder), batch_size=2, guidance_scale=3)
    evaluate(*both(folder), batch_size=5, guidance_scale=3, output="other")
    pipeline = evaluation.load_pipeline(str(folder / "model1"), str(folder / "model0"), torch.device("cpu"))
    expected = pipeline(
        PROMPTS[0], num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(1_000_002)
    ).images[0]  # fmt: skip
    for output in ("out", "other"):
        (path,) = (tmp_path / output / "images").glob("other-*/00002-*.png")
        difference = np.asarray(Image.open(path), int) - np.asarray(expected, int)
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(("guidance", "rows"), [(1, 2), (3, 4)])
def test_nfe_is_the_number_of_unet_rows_of_an_image(guidance, rows, evaluate, folder):
    models = evaluate(*both(folder), guidance_scale=guidance)["models"]
    assert models["base"]["nfe"] == models["other"]["nfe"] == rows
    assert models["base"]["seconds"] > 0


def test_second_run_draws_nothing_and_an_interrupted_one_only_the_rest(evaluate, folder, tmp_path, monkeypatch):
    first = evaluate(*both(folder))
    loads = []
    load = evaluation.load_pipeline
    monkeypatch.setattr(evaluation, "load_pipeline", lambda *args: loads.append(args) or load(*args))
    again = evaluate(*both(folder))
    assert loads == [] and again == first  # NFE and seconds are remembered too, a metric computed twice is identical
    images = sorted((tmp_path / "out" / "images").glob("other-*/*.png"))
    kept = {path: path.read_bytes() for path in images}
    for path in images[3:]:
        path.unlink()
    (images[4].parent / f"{images[4].name}.partial").write_bytes(b"half")
    evaluate(*both(folder))
    assert [arguments[0] for arguments in loads] == [str(folder / "model1")]
    assert {path: path.read_bytes() for path in images} == kept
    evaluate(*both(folder), num_images=7)
    assert len(list((tmp_path / "out" / "images").glob("base-*/*.png"))) == 7


@pytest.mark.parametrize("change", ["weights", "guidance", "steps", "seed", "prompts"])
def test_images_of_other_settings_are_never_taken(change, evaluate, folder, tmp_path):
    shutil.copytree(folder / "model0", tmp_path / "model")
    options = {"models": [("base", tmp_path / "model")], "flags": {}}
    evaluate(*options["models"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").rglob("*.png")}
    if change == "weights":
        shutil.copy(folder / "model1" / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "model" / "unet")
    elif change == "prompts":
        (tmp_path / "swapped.txt").write_text("\n".join(reversed(PROMPTS)))
        options["flags"] = {"prompts": tmp_path / "swapped.txt"}
    else:
        options["flags"] = {
            "guidance": {"guidance_scale": 2},
            "steps": {"num_inference_steps": 3},
            "seed": {"seed": 5},
        }[change]
    evaluate(*options["models"], **options["flags"])
    after = set((tmp_path / "out" / "images").rglob("*.png"))
    assert len(after) == 2 * len(before) and before.keys() < after


def test_what_a_search_found_for_one_reward_is_not_taken_for_another(evaluate, folder, tmp_path):
    reward = tmp_path / "mine.py"
    for sign in (1, -1):
        reward.write_text(f"def mine(images, prompts):\n    return {sign} * images.mean((1, 2, 3))  # {sign}\n")
        model = folder / "model0"
        summary = evaluate(("base", model), ("found", f"{model}@best_of_n:3"), reward_model=f"{reward}:mine")
        assert summary["metrics"][f"{reward}:mine"]["found"]["gain"] > 0
    assert len(list((tmp_path / "out" / "images").glob("found-*"))) == 2
    assert len(list((tmp_path / "out" / "images").glob("base-*"))) == 1


@pytest.mark.parametrize("guidance", [0, 0.5])
def test_guidance_below_one_is_none_for_search_as_for_the_pipeline(guidance, evaluate, folder):
    model = folder / "model0"
    summary = evaluate(("base", model), ("one", f"{model}@best_of_n:1"), guidance_scale=guidance)
    assert summary["models"]["base"]["nfe"] == summary["models"]["one"]["nfe"] == 2
    assert summary["metrics"]["shapes"]["one"]["gain"] == pytest.approx(0, abs=1e-4)


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


def test_lora_folder_is_applied_to_the_base(evaluate, folder, tmp_path):
    from types import SimpleNamespace

    unet = StableDiffusionXLPipeline.from_pretrained(folder / "model0").unet
    unet.requires_grad_(False).add_adapter(sdxl.lora_config(SimpleNamespace(lora_rank=4, lora_alpha=9.0)))
    with torch.no_grad():
        for parameter in sdxl.trainable_parameters(unet):
            parameter.normal_(std=0.3)
    sdxl.save_lora(unet, tmp_path / "lora")
    evaluate(("base", folder / "model0"), ("lora", tmp_path / "lora"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "model0")
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.scheduler = evaluation.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    generator = torch.Generator().manual_seed(1_000_000)
    expected = pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=1.0, generator=generator).images[0]
    (path,) = (tmp_path / "out" / "images").glob("lora-*/00000-*.png")
    (base,) = (tmp_path / "out" / "images").glob("base-*/00000-*.png")
    drawn, expected, base = (np.asarray(image, int) for image in (Image.open(path), expected, Image.open(base)))
    assert np.abs(drawn - expected).max() <= 1 < np.abs(drawn - base).max()


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


def test_export_for_t2i_compbench(evaluate, folder, tmp_path, capsys):
    evaluate(("base", folder / "model0"), export="t2i-compbench", num_images=6)
    samples = tmp_path / "out" / "t2i-compbench" / "base" / "samples"
    names = sorted((path.name for path in samples.iterdir()), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    # The scorers read the prompt before the underscore and sort by the number behind it: all of one prompt in a row.
    assert [name.split("_")[0] for name in names] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert names[0] == f"{PROMPTS[0]}_000000.png"
    (third,) = (tmp_path / "out" / "images").glob("base-*/00002-*.png")
    assert (samples / names[1]).read_bytes() == third.read_bytes()
    commands = capsys.readouterr().out
    assert f"python BLIP_vqa.py --out_dir={samples.parent}" in commands and "2D_spatial_eval.py" in commands
    evaluate(("base", folder / "model0"), export="t2i-compbench", num_images=2)
    assert len(list(samples.iterdir())) == 2  # nothing is left of an earlier export


def test_export_for_geneval(evaluate, folder, tmp_path, capsys):
    rows = [{"tag": "colors", "include": [{"class": "circle", "count": 1}], "prompt": prompt} for prompt in PROMPTS]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    evaluate(("base", folder / "model0"), export="geneval", prompts=path, num_images=4)
    root = tmp_path / "out" / "geneval" / "base"
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) == [
        f"0000{n}/{file}" for n in (0, 1) for file in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert [json.loads((root / f"0000{n}" / "metadata.jsonl").read_text()) for n in (0, 1)] == rows
    (fourth,) = (tmp_path / "out" / "images").glob("base-*/00003-*.png")
    assert (root / "00001" / "samples" / "0001.png").read_bytes() == fourth.read_bytes()
    assert f"evaluate_images.py {root}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("geneval", "a cat", "needs --prompts evaluation_metadata.jsonl"),
        ("t2i-compbench", "a_cat", "an underscore"),
        ("t2i-compbench", "a\nb\nc", r"--num_images 400 does not give each of the 3 prompts .* use 30 \(10 each"),
    ],
)
def test_prompts_that_a_scorer_would_misread_are_refused(kind, text, said, folder, tmp_path):
    (tmp_path / "p.txt").write_text(text)
    flags = ["--models", f"a={folder}/model0", f"--prompts={tmp_path}/p.txt", "--reward_model=jpeg_compressibility"]
    with pytest.raises(UserError, match=said):
        main([*flags, f"--export={kind}", f"--output_dir={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- statistics


def test_closed_form():
    scores, base = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 4.0, 1.0])
    result = evaluation.compare(scores, base)
    assert (result.images, result.mean, result.gain, result.win_rate) == (4, 2.5, 0.75, 0.625)
    assert result.standard_error == pytest.approx(scores.std(ddof=1) / 2)
    assert result.gain_standard_error == pytest.approx((scores - base).std(ddof=1) / 2)
    assert 0 <= result.win_low <= result.win_rate <= result.win_high <= 1
    assert evaluation.compare(scores, base) == result


def test_images_without_a_score_in_either_are_left_out():
    scores, base = np.array([1.0, np.nan, 3.0, 5.0]), np.array([0.0, 2.0, np.nan, 6.0])
    result = evaluation.compare(scores, base)
    assert (result.images, result.mean, result.gain, result.win_rate) == (2, 3.0, 0.0, 0.5)
    nothing = evaluation.compare(np.array([np.nan]), np.array([1.0]))
    assert nothing.images == 0 and math.isnan(nothing.mean) and math.isnan(nothing.win_low)


@pytest.mark.slow
@pytest.mark.parametrize(("probability", "ties"), [(0.5, 0.0), (0.7, 0.0), (0.6, 0.3)])
def test_interval_covers_the_true_win_rate_at_its_nominal_rate(probability, ties):
    """300 synthetic evaluations of 150 images each; the standard error of the coverage is 0.013."""
    rng = np.random.default_rng(0)
    truth = probability * (1 - ties) + 0.5 * ties
    covered = 0
    for trial in range(300):
        tied = rng.random(150) < ties
        difference = np.where(tied, 0.0, np.where(rng.random(150) < probability, 1.0, -1.0))
        result = evaluation.compare(difference, np.zeros(150), resamples=500, seed=trial)
        covered += result.win_low <= truth <= result.win_high
    assert 0.91 <= covered / 300 <= 0.985


# ---------------------------------------------------------------------------------------------------------- bad input


def test_prompt_sets(tmp_path):
    assert len(load_prompt_set("shapes")) == 9
    assert set(NAMES) == {"shapes", *PUBLISHED} and "t2i-compbench:non_spatial" in NAMES
    for name, said in (("drawbenc", "did you mean drawbench"), (str(tmp_path / "no.txt"), "neither a file nor a set")):
        with pytest.raises(UserError, match=said):
            load_prompt_set(name)


@pytest.mark.parametrize("name", ["drawbench", "t2i-compbench:color"])
def test_set_out_of_reach_is_one_sentence(name, tmp_path, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=f"--prompts {name} could not be downloaded .*no route"):
        load_prompt_set(name, cache_dir=str(tmp_path))


def test_published_set_is_read_from_its_column(monkeypatch):
    import datasets

    asked = []
    rows = {"Prompts": ["a cat", "", "a  dog\n", "a cat"]}
    monkeypatch.setattr(datasets, "load_dataset", lambda **source: asked.append(source) or rows)
    assert load_prompt_set("drawbench") == ["a cat", "a dog"]
    assert asked[0]["path"] == "sayakpaul/drawbench"


BAD = {
    "no path": (["--models", "base"], "--models base must be NAME=PATH"),
    "a name that is no folder": (["--models", "a/b=x"], "use letters, digits and _"),
    "one name twice": (["--models", "a={0}", "a={1}"], "two models have one name"),
    "no pipeline": (["--models", "a={0}", "b=."], r"--models \. holds no model_index.json"),
    "unknown search": (["--models", "a={0}", "b={0}@best:3"], "there is no search best; choose one of best_of_n"),
    "search without numbers": (["--models", "a={0}@zero_order:3"], "must be zero_order:iterations:neighbours:radius"),
    "search with words": (["--models", "a={0}@smc:many"], "must be smc:particles:temperature"),
    "search of nothing": (["--models", "a={0}@best_of_n:0"], "must be best_of_n:n, numbers above 0"),
    "search with too much": (["--models", "a={0}@demon:1:2"], "must be demon:candidates"),
    "radius beyond 1": (["--models", "a={0}@zero_order:1:2:2"], r"the radius must lie in \(0, 1\]"),
    "temperature of nothing": (["--models", "a={0}@smc:4:nan"], "must be smc:particles:temperature"),
    "odd resolution": (["--models", "a={0}", "--resolution=30"], "--resolution is 30"),
    "too many steps": (["--models", "a={0}", "--num_inference_steps=1001"], "--num_inference_steps is 1001"),
    "no image": (["--models", "a={0}", "--num_images=0"], "--num_images is 0"),
    "negative guidance": (["--models", "a={0}", "--guidance_scale=-1"], "--guidance_scale is -1"),
    "unknown reward": (["--models", "a={0}", "--reward_model=nothing"], "--reward_model"),
    "unknown metric": (["--models", "a={0}", "--metrics", "nothing"], "nothing"),
    "missing prompts": (["--models", "a={0}", "--prompts=missing.txt"], "--prompts missing.txt"),
    "unknown flag": (["--models", "a={0}", "--seeds=1"], "--seeds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_flag(case, folder, tmp_path):
    flags, said = BAD[case]
    flags = [flag.format(folder / "model0", folder / "model1") for flag in flags]
    with pytest.raises(UserError) as caught:
        main(["--output_dir", str(tmp_path), "--prompts=shapes", "--reward_model=shapes", *flags])
    assert re.search(said, str(caught.value)) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_script_runs_as_a_plain_file_from_anywhere(tmp_path):
    flags = ["--models=base", "--prompts=shapes", "--reward_model=shapes", "--output_dir=out"]
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: --models base must be NAME=PATH\n"


def test_adapter_cannot_be_the_base(folder, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    flags = ["--output_dir", str(tmp_path / "out"), "--prompts=shapes", "--reward_model=shapes"]
    with pytest.raises(UserError, match="is a LoRA adapter; name the pipeline"):
        main([*flags, "--models", f"a={tmp_path}/lora"])
    with pytest.raises(UserError, match="does not fit"):
        main(
            [
                *flags,
                "--models",
                f"a={folder}/model0",
                f"b={tmp_path}/lora",
                "--num_images=1",
                "--num_inference_steps=1",
            ]
        )
