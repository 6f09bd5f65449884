"""`scripts/compare_models.py` on two tiny pipelines."""

import json

import pytest
from PIL import Image

from scripts.compare_models import main
from scripts.make_tiny_sdxl import build_random_sdxl
from sharpening.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    for seed in (0, 1):
        build_random_sdxl(folder / f"model{seed}", seed=seed)
    (folder / "prompts.txt").write_text("a red circle on a white background\n\na blue square on a gray background\n")
    return folder


def compare(folder, base="model0", trained="model1", **options):
    flags = {"num_images": 5, "num_inference_steps": 2, "guidance_scale": 1, "batch_size": 2, "reward_model": "shapes"}
    flags |= {"base": folder / base, "trained": folder / trained, "prompts": folder / "prompts.txt"}
    flags |= {"output_dir": folder / f"{base}-{trained}", **options}
    assert main([f"--{name}={value}" for name, value in flags.items()]) == 0
    return json.loads((flags["output_dir"] / "comparison.json").read_text())["reward"]


def test_a_model_does_not_differ_from_itself_and_batches_do_not_matter(folder, capsys):
    reward = compare(folder, "model0", "model0")
    assert reward["difference"] == {"mean": 0.0, "standard_error": 0.0}
    other = compare(folder, "model0", "model0", batch_size=5)
    assert other["base"]["mean"] == pytest.approx(reward["base"]["mean"], abs=1e-3)
    assert "before" in capsys.readouterr().out


def test_difference_is_that_of_the_means_and_the_grid_is_drawn(folder):
    reward = compare(folder, "model0", "model1")
    expected = reward["trained"]["mean"] - reward["base"]["mean"]
    assert reward["difference"]["mean"] == pytest.approx(expected, abs=1e-6)
    assert reward["difference"]["mean"] != 0
    with Image.open(folder / "model0-model1" / "before_after.png") as grid:
        assert grid.width > 1000 and len(grid.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "missing.txt"}, "--prompts missing.txt"),
        ({"num_images": 0}, "--num_images"),
        ({"reward_model": "nothing"}, "--reward_model"),
        ({"trained": "."}, "--trained .* has no model_index.json"),
    ],
)
def test_bad_input_names_the_flag(folder, options, message):
    with pytest.raises(UserError, match=message):
        compare(folder, **options)
