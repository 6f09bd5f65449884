"""What W&B, offline, and TensorBoard get of a run, and the pictures with their captions."""

import json
import math

import numpy as np
import pytest
import torch
import wandb
from accelerate import Accelerator
from PIL import Image

from sharpening.running import pictures, tracking
from sharpening.running.metric_names import GROUPS, IN_GROUP, meaning
from sharpening.running.pictures import BranchTable, Pictures, captioned_grid
from tests.support.runs import metrics
from tests.support.wandb_files import offline_run

PROMPT = "a red circle on a white background"


@pytest.fixture
def method():
    return "RLHF"


@pytest.fixture
def offline(train, flags, tmp_path):
    """An offline W&B run of two steps, both of which show branches and the second of which validates."""
    options = {"preset": "efficient", "num_noisy_latents": 3, "infer_steps": 2, "reward_on": "trajectory"}
    options |= {"reward_model": "shapes,jpeg_compressibility:0.1", "branch_image_steps": 1, "report_to": "wandb"}
    options |= {"validation_prompt": PROMPT, "validation_steps": 2, "validation_epochs": 0, "api_key": "sk-PLANTED"}
    wandb.teardown()  # it keeps the environment that it was first used in, which may have been another test's
    assert train(flags(**options, base_url="http://localhost:1")) == 0
    return offline_run(tmp_path / "run")


def test_wandb_has_groups_axes_captions_a_table_and_the_resolved_preset(offline, tmp_path):
    lines = metrics(tmp_path / "run")
    for line in lines:
        logged = offline.history[line["step"]]
        for name, value in line.items():
            group = IN_GROUP.get(name, name)
            assert group.partition("/")[0] in GROUPS and logged[group] == pytest.approx(value)
    axes = {"cost/steps", "cost/forwards", "cost/seconds"}
    assert axes <= offline.metrics.keys()
    assert {f"{group}/*": offline.metrics[f"{group}/*"] for group in GROUPS} == {
        f"{group}/*": "cost/steps" for group in GROUPS
    }
    # What the preset means, what was given over it, and no secret.
    config = offline.config
    assert config["preset"] == "efficient" and config["generation_reuse"] == 4 and config["num_noisy_latents"] == 3
    assert "api_key" not in config and "sk-PLANTED" not in json.dumps(config)

    best = offline.history[1]["branches/best"]
    assert len(best["captions"]) == best["count"] == 2
    for caption in best["captions"]:
        prompt, facts = caption.split(" | ")
        reward, shapes, jpeg, t = (fact.rsplit(" ", 1) for fact in facts.split(", "))
        assert prompt.startswith("a ") and [part[0] for part in (reward, shapes, jpeg, t)] == [
            "reward", "shapes", "jpeg_compressibility", "t",
        ]  # fmt: skip
        assert float(reward[1]) == pytest.approx(float(shapes[1]) + 0.1 * float(jpeg[1]), abs=0.02)
        assert 0 <= int(t[1]) < 1000
    validated = offline.history[2]["validation/images"]["captions"]
    assert [caption.split(" | ")[0] for caption in validated] == [PROMPT] * 4
    rewards = [float(caption.split("reward ")[1]) for caption in validated]
    assert sum(rewards) / 4 == pytest.approx(lines[1]["validation/reward"], abs=0.01)
    table = offline.history[2]["branches/table"]
    assert table["_type"] == "incremental-table-file" and table["ncols"] == len(pictures.TABLE_COLUMNS)
    tables = [json.loads(path.read_text()) for path in sorted(offline.files.rglob("table/**/*.json"))]
    rows = [dict(zip(pictures.TABLE_COLUMNS, row, strict=True)) for part in tables for row in part["data"]]
    assert sorted((row["step"], row["kind"]) for row in rows) == [
        (step, kind) for step in (1, 2) for kind in ("best", "worst") for _ in range(2)
    ]
    assert all("shapes" in row["components"] for row in rows)
    # An artifact for each step: the rows of that step and their images.
    pictured = [sum(path.endswith(".png") for path in artifact) for artifact in offline.artifacts]
    assert pictured == [4, 4]


def test_table_of_branches_is_bounded_and_has_the_extremes(tmp_path):
    accelerator = Accelerator(log_with="wandb", cpu=True, project_dir=str(tmp_path))
    tracking.start_trackers(accelerator, {}, "bounded", "wandb")
    rewards = [0.5, math.nan, 0.1, 0.9, 0.3, 0.7, 0.2]
    shown = Pictures(torch.zeros(7, 3, 8, 8), list("abcdefg"), rewards, [{}] * 7, [None] * 7)
    table = BranchTable(accelerator, steps=100_000, every=1)
    for step in range(1000, 100_001, 1000):
        table.add(step, {"branches/best": shown, "branches/worst": shown})
        table.add(step, {"validation/images": shown})
    accelerator.end_training()
    assert len(table.table.data) == pictures.TABLE_ROWS
    assert {row[0] for row in table.table.data} == set(range(2000, 100_001, 2000))
    first = [(row[1], row[2]) for row in table.table.data[:8]]
    assert first == [("best", of) for of in "dfae"] + [("worst", of) for of in "cgea"]


def test_picture_has_the_image_above_its_words():
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shown = Pictures.judged(images, [PROMPT, "", *"abc"], torch.tensor([0.25, math.nan, 1, 2, 3]))
    assert shown.captions() == [f"{PROMPT} | reward 0.25", "", "a | reward 1", "b | reward 2", "c | reward 3"]
    grid = captioned_grid(shown)
    without = captioned_grid(shown._replace(prompts=[""] * 5, rewards=[math.nan] * 5))
    assert grid.width == without.width and grid.height > without.height
    # The first of three in a row, five times as wide and as high as it was.
    pixels = torch.from_numpy(np.asarray(grid).copy())
    assert torch.equal(pixels[4:164:5, 4:164:5], (images[0].permute(1, 2, 0) * 255).round().to(torch.uint8))
    words = pixels[164:200, 4:164].float().mean(-1)
    assert (words < 100).sum() > 50 and (pixels[164:200, 168:328] == 255).all()  # the second has none


def test_large_images_stay_as_large_as_they_are():
    shown = Pictures.judged(torch.zeros(1, 3, 300, 300), ["a long prompt " * 40], torch.ones(1))
    grid = captioned_grid(shown)
    assert 300 < grid.width < 330 and isinstance(grid, Image.Image) and 300 < grid.height < 300 + 7 * 20


def test_every_curve_of_a_run_has_a_meaning(train, flags, tmp_path, offline):
    named = {IN_GROUP.get(name, name) for line in metrics(tmp_path / "run") for name in line}
    assert {name for name in named if not meaning(name)} == {"cost/steps"}
