"""The training of the tiny SDXL, and the trained copy in the tree."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPTokenizer

from sharpening.errors import UserError
from tests.support.runs import ROOT
from tiny_world import make_shapes_dataset, signs
from tiny_world.make_tiny_sdxl import (
    encode_captions,
    encode_images,
    main,
    reconstruct,
    reconstruction_score,
    standardise_latents,
    standardise_pooled,
    train_sdxl,
    write_grid,
)
from tiny_world.shapes import all_captions, draw, score
from tiny_world.tiny_sdxl import make_pipeline, save_pipeline

TRAINED = ROOT / "tiny_world" / "sdxl"


def test_standardising_latents_keeps_every_reconstruction():
    vae, rng = make_pipeline().vae, np.random.default_rng(0)
    drawings = np.stack([np.asarray(draw(caption, rng, 32)) for caption in all_captions()])
    images = torch.from_numpy(drawings).permute(0, 3, 1, 2) / 127.5 - 1
    before = reconstruct(vae, images)
    standardise_latents(vae, images)
    latents = encode_images(vae, images) * vae.config.scaling_factor
    np.testing.assert_allclose(reconstruct(vae, images), before, atol=1e-5)
    np.testing.assert_allclose(latents.mean(dim=(0, 2, 3)), 0.0, atol=1e-3)
    np.testing.assert_allclose(latents.std(), 1.0, atol=1e-2)


def test_standardised_pooled_features_say_every_word_of_a_number():
    pipeline, captions = make_pipeline(world="signs"), signs.all_captions()
    standardise_pooled(pipeline, captions)
    _, pooled, rows = encode_captions(pipeline, captions)
    pooled = pooled[rows]  # (N, P)
    np.testing.assert_allclose(pooled.mean(dim=0), 0.0, atol=1e-4)
    assert pooled.std().item() == pytest.approx(1.0, abs=1e-2)
    tens = torch.tensor([int(signs.parse(caption)[1][0]) - 2 for caption in captions])
    means = torch.stack([pooled[tens == digit].mean(dim=0) for digit in range(8)])
    assert torch.pdist(means).min() > 0.1  # no first digit is like another


@pytest.mark.slow
def test_training_for_a_few_steps_gives_the_same_pipeline_twice(tmp_path):
    """The user's door, cut to a handful of steps: it trains, saves whole folders, and repeats itself exactly."""
    data = tmp_path / "data"
    assert make_shapes_dataset.main(["--output_dir", str(data), "--num_images", "60", "--captions", "all"]) == 0
    for name in ("one", "two"):
        save_pipeline(train_sdxl(data, vae_steps=2, unet_steps=2), tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors"))
    assert len(files) == 4
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_the_trained_copy_is_small_and_loads_and_follows_its_prompt():
    assert sum(file.stat().st_size for file in TRAINED.rglob("*") if file.is_file()) <= 8e6
    pipeline = StableDiffusionXLPipeline.from_pretrained(TRAINED)
    pipeline.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)} == {
        torch.float32
    }
    assert reconstruction_score(pipeline.vae) >= 0.9
    captions = all_captions()[::3]
    images = pipeline(
        captions, num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert score(images, captions).mean() > 0.45  # 0.33 would be the background alone


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give one of --random and --dataset DIR"),
        (["--random", "--dataset=images"], "give one of --random and --dataset DIR"),
        (["--random", "--vae_steps=0"], "--vae_steps is 0, but it must be at least 1"),
        (["--dataset=nowhere"], "--dataset nowhere has no readable metadata.jsonl"),
    ],
)
def test_nonsense_flags_are_refused(flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        main([f"--output_dir={tmp_path}/new", *flags])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag", ["output_dir", "grid"])
def test_place_that_cannot_be_written_is_refused_before_training(flag, tmp_path):
    (tmp_path / "file").touch()
    places = {"output_dir": tmp_path / "new", "grid": tmp_path / "grid.png", flag: tmp_path / "file" / "in"}
    if flag == "grid":
        places["grid"] = tmp_path / "file" / "in" / "grid.png"
    with pytest.raises(UserError, match=f"--{flag} .* cannot be written, because .* is not a writable folder"):
        main(["--dataset=nowhere", *(f"--{name}={place}" for name, place in places.items())])


def test_a_filled_folder_is_refused_and_an_empty_one_is_not(tmp_path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"--output_dir .* already holds something; name .* an empty folder"):
        main([f"--output_dir={tmp_path}", "--random"])
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]
    (tmp_path / "empty").mkdir()
    save_pipeline(make_pipeline(), tmp_path / "empty")
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "empty").unet.dtype == torch.float32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "precious.txt"]


def test_a_random_model_of_signs_knows_their_words(tmp_path):
    assert main([f"--output_dir={tmp_path}/signs", "--random", "--world=signs"]) == 0
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "signs" / "tokenizer")
    assert tokenizer.tokenize("sign forty seven") == ["sign</w>", "forty</w>", "seven</w>"]


def test_the_grid_shows_every_image_in_its_place(tmp_path):
    images = np.arange(6)[:, None, None, None] / 5 * np.ones((6, 2, 3, 3))
    write_grid(tmp_path / "grid.png", images, columns=3)
    with Image.open(tmp_path / "grid.png") as grid:
        pixels = np.asarray(grid)
    assert pixels.shape == (2 * 2 * 2, 3 * 3 * 2, 3)
    assert pixels[::4, ::6, 0].tolist() == [[0, 51, 102], [153, 204, 255]]
