"""Images are those of the stock pipeline, drawn once, and never taken for those of other settings."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image

from sharpening import sdxl
from sharpening.evaluation import drawing
from tests.support.evaluation import PROMPTS, both


def test_images_are_those_of_the_stock_pipeline_whatever_the_batch(evaluate, folder, tmp_path):
    evaluate(*both(folder), batch_size=2, guidance_scale=3)
    evaluate(*both(folder), batch_size=5, guidance_scale=3, output="other")
    pipeline = drawing.load_pipeline(str(folder / "model1"), str(folder / "model0"), torch.device("cpu"))
    expected = pipeline(
        PROMPTS[0], num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(1_000_002)
    ).images[0]  # fmt: skip
    for output in ("out", "other"):
        (path,) = (tmp_path / output / "images").glob("other-*/00002-*.png")
        difference = np.asarray(Image.open(path), int) - np.asarray(expected, int)
        assert np.abs(difference).max() <= 1


def test_second_run_draws_nothing_and_an_interrupted_one_only_the_rest(evaluate, folder, tmp_path, monkeypatch):
    first = evaluate(*both(folder))
    loads = []
    load = StableDiffusionXLPipeline.from_pretrained

    def counted(path, **options):
        loads.append(path)
        return load(path, **options)

    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", counted)
    again = evaluate(*both(folder))
    assert loads == [] and again == first  # NFE and seconds are remembered too, a metric computed twice is identical
    images = sorted((tmp_path / "out" / "images").glob("other-*/*.png"))
    kept = {path: path.read_bytes() for path in images}
    for path in images[3:]:
        path.unlink()
    (images[4].parent / f".{images[4].name}.partial").write_bytes(b"half")
    evaluate(*both(folder))
    assert loads == [str(folder / "model1")]
    assert {path: path.read_bytes() for path in images} == kept
    assert not list((tmp_path / "out").rglob("*.partial"))
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


def test_lora_folder_is_applied_to_the_base(evaluate, folder, tmp_path):

    unet = StableDiffusionXLPipeline.from_pretrained(folder / "model0").unet
    unet.requires_grad_(False).add_adapter(sdxl.lora_config(4, 9.0))
    with torch.no_grad():
        for parameter in sdxl.trainable_parameters(unet):
            parameter.normal_(std=0.3)
    sdxl.save_lora(unet, tmp_path / "lora")
    evaluate(("base", folder / "model0"), ("lora", tmp_path / "lora"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "model0")
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    generator = torch.Generator().manual_seed(1_000_000)
    expected = pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=1.0, generator=generator).images[0]
    (path,) = (tmp_path / "out" / "images").glob("lora-*/00000-*.png")
    (base,) = (tmp_path / "out" / "images").glob("base-*/00000-*.png")
    drawn, expected, base = (np.asarray(image, int) for image in (Image.open(path), expected, Image.open(base)))
    assert np.abs(drawn - expected).max() <= 1 < np.abs(drawn - base).max()
