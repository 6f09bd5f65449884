"""Two tiny pipelines, prompts, and the command as a function."""

import json

import pytest

from scripts.evaluate import main
from tests.support.evaluation import PROMPTS
from tiny_world.tiny_sdxl import build_random_sdxl


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
