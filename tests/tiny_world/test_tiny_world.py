"""The tiny world: its captions, drawings and reward, its data set on disk, and the tiny SDXL in both editions."""

import collections
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image, ImageFilter

from tiny_world.make_shapes_dataset import main as make_dataset
from tiny_world.make_tiny_sdxl import (
    build_random_sdxl,
    encode_images,
    make_tokenizer,
    reconstruct,
    reconstruction_score,
    save_pipeline,
    standardise_latents,
    train_sdxl,
)
from tiny_world.make_tiny_sdxl import main as make_sdxl
from tiny_world.shapes import (
    all_captions,
    caption_of,
    draw,
    held_out_captions,
    parse,
    score,
    training_captions,
    wrong_caption,
)

ROOT = Path(__file__).resolve().parents[2]
TRAINED = ROOT / "tiny_world" / "sdxl"


def drawings(captions, seed=0, size=32):
    """One clean drawing per caption, `(B, size, size, 3)` in [0, 1]."""
    rng = np.random.default_rng(seed)
    return np.stack([np.asarray(draw(caption, rng, size)) for caption in captions]) / 255.0


# ------------------------------------------------------------------------------------------------------- captions


def test_the_grammar_has_54_captions_and_holds_9_out_evenly():
    everything, held_out, training = all_captions(), held_out_captions(), training_captions()
    assert len(set(everything)) == 54
    assert len(held_out) == 9 and len(training) == 45
    assert set(held_out) | set(training) == set(everything)
    assert "a red circle on a white background" in everything
    assert all(caption_of(*parse(caption)) == caption for caption in everything)
    uses = collections.Counter(name for caption in held_out for name in parse(caption))
    assert {uses[name] for name in ("circle", "square", "triangle", "white", "gray", "black")} == {3}
    assert {uses[parse(caption)[0]] for caption in everything} == {1, 2}


@pytest.mark.parametrize("caption", ["", "a pink dog", "a red circle", "A red circle on a white background."])
def test_a_caption_outside_of_the_grammar_is_named(caption):
    with pytest.raises(ValueError, match="not one of the shapes world's") as error:
        score(np.zeros((1, 32, 32, 3)), [caption])
    assert repr(caption) in str(error.value)


def test_a_wrong_caption_differs_in_colour_or_shape_and_keeps_its_background():
    rng = np.random.default_rng(0)
    changes = collections.Counter()
    for caption in all_captions() * 10:
        before, after = parse(caption), parse(wrong_caption(caption, rng))
        assert before != after and before[2] == after[2]
        changes[before[0] != after[0], before[1] != after[1]] += 1
    assert set(changes) == {(True, False), (False, True), (True, True)}
    assert min(changes.values()) > 120  # a third of 540 each, give or take four standard deviations


# --------------------------------------------------------------------------------------------------------- reward


@pytest.mark.parametrize("size", [32, 64])
def test_clean_drawings_score_high(size):
    captions = all_captions() * (6 if size == 32 else 2)
    scores = score(drawings(captions, seed=1, size=size), captions)
    assert scores.dtype == np.float32 and scores.shape == (len(captions),)
    assert scores.min() >= 0.95 and scores.max() <= 1.0


def test_each_wrong_attribute_costs_a_third():
    captions = all_captions()
    for shown in captions[::5]:
        images = np.repeat(drawings([shown], seed=2), len(captions), axis=0)
        wrong = [sum(a != b for a, b in zip(parse(c), parse(shown), strict=True)) for c in captions]
        np.testing.assert_allclose(score(images, captions), (3 - np.array(wrong)) / 3, atol=0.03)


def test_blank_and_noisy_images_score_low():
    captions = all_captions()
    rng = np.random.default_rng(3)
    for level in (0.0, 0.5, 1.0):
        assert score(np.full((54, 32, 32, 3), level), captions).max() == 0.0
    assert score(rng.random((54, 32, 32, 3)), captions).max() < 0.15
    assert score(rng.normal(0.5, 0.2, (54, 32, 32, 3)).clip(0, 1), captions).max() < 0.15
    halves = np.zeros((54, 32, 32, 3))
    halves[:, :, 16:] = 1.0  # an edge is no figure
    assert score(halves, captions).max() < 0.4


def test_the_reward_falls_smoothly_as_a_drawing_degrades():
    captions = all_captions()
    rng = np.random.default_rng(4)
    clean = drawings(captions)
    noisy = [score((clean + rng.normal(0, sd, clean.shape)).clip(0, 1), captions).mean() for sd in (0, 0.1, 0.2)]
    assert noisy[0] > noisy[1] > noisy[2]
    pictures = [Image.fromarray((image * 255).astype(np.uint8)) for image in clean]
    blurred = [
        score(np.stack([np.asarray(p.filter(ImageFilter.GaussianBlur(radius))) for p in pictures]) / 255.0, captions)
        for radius in (1, 2, 3)
    ]
    assert 0.95 < blurred[0].mean() < 1.0 and blurred[0].mean() > blurred[1].mean() > blurred[2].mean()


def test_a_batch_scores_as_its_images_do_alone():
    captions = all_captions()[::9]
    images = drawings(captions)
    images[0] = images[0][:, ::-1] * 0.8
    alone = [score(images[i : i + 1], captions[i : i + 1])[0] for i in range(len(captions))]
    np.testing.assert_allclose(score(images, captions), alone, atol=1e-6)
    assert score(np.zeros((0, 32, 32, 3)), []).shape == (0,)


def test_images_and_captions_must_match():
    with pytest.raises(ValueError, match="one caption each"):
        score(np.zeros((2, 32, 32, 3)), all_captions()[:1])


# ------------------------------------------------------------------------------------------------------- data set


def test_the_data_set_is_an_ordinary_image_folder(tmp_path):
    from datasets import load_dataset

    folder = tmp_path / "new" / "shapes"
    assert make_dataset(["--output_dir", str(folder), "--num_images", "90", "--seed", "5"]) == 0
    assert [child.name for child in folder.parent.iterdir()] == ["shapes"]  # nothing left aside
    data = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == 90 and set(data.column_names) == {"image", "text"}
    assert set(data["text"]) == set(training_captions())  # and so no held-out caption
    images = np.stack([np.asarray(image) for image in data["image"]]) / 255.0
    assert images.shape == (90, 32, 32, 3)
    assert score(images, list(data["text"])).min() > 0.95


def test_the_wrong_fraction_and_the_seed_are_kept(tmp_path):
    flags = ["--num_images", "100", "--wrong_fraction", "0.4", "--captions", "all", "--size", "48"]
    for name in ("one", "two"):
        assert make_dataset(["--output_dir", str(tmp_path / name), "--seed", "7", *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "one" / "metadata.jsonl").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(tmp_path / "one" / row["file_name"])) for row in rows]) / 255.0
    assert images.shape[1:] == (48, 48, 3)
    assert (score(images, [row["text"] for row in rows]) < 0.8).sum() == 40
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_held_out_prompts_are_one_per_line(tmp_path):
    target = tmp_path / "held_out.txt"
    assert make_dataset(["--held_out_prompts", str(target)]) == 0
    assert target.read_text().splitlines() == held_out_captions()


def test_a_filled_folder_is_refused_in_one_sentence(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("keep me")
    for main, flags in ((make_dataset, []), (make_sdxl, ["--random"])):
        assert main(["--output_dir", str(tmp_path), *flags]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "--output_dir" in message and "empty folder" in message
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--num_images", "0"],
        ["--wrong_fraction", "1.5"],
        ["--size", "8"],
        ["--seed", "-1"],
        ["--captions", "none"],
    ],
)
def test_nonsense_flags_exit_with_status_2(flags, tmp_path):
    if flags:
        flags = ["--output_dir", str(tmp_path / "new"), *flags]
    with pytest.raises(SystemExit) as leaving:
        make_dataset(flags)
    assert leaving.value.code == 2 and not (tmp_path / "new").exists()


def test_the_command_runs_as_a_plain_file_from_anywhere(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tiny_world" / "make_shapes_dataset.py"),
        "--held_out_prompts",
        "prompts.txt",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "prompts.txt").exists()


# -------------------------------------------------------------------------------------------------- the tiny SDXL


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "sdxl"
    build_random_sdxl(folder)
    return folder


def test_every_word_is_one_token_and_any_text_has_tokens():
    tokenizer = make_tokenizer("<|endoftext|>")
    for caption in all_captions():
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption
    text = "".join(map(chr, range(33, 127))) + " naïve 図"
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.unk_token_id not in ids
    assert len(tokenizer(text * 5, truncation=True).input_ids) == 77


def test_the_random_pipeline_has_the_structure_of_sdxl(random_folder):
    pipeline = StableDiffusionXLPipeline.from_pretrained(random_folder)
    assert sum(file.stat().st_size for file in random_folder.rglob("*") if file.is_file()) < 4e6
    assert pipeline.default_sample_size * pipeline.vae_scale_factor == 32
    assert pipeline.vae.config.latent_channels == 4
    assert pipeline.unet.config.addition_embed_type == "text_time"
    assert pipeline.config.force_zeros_for_empty_prompt is True
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    wanted = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "set_alpha_to_one": False,
        "clip_sample": False,
        "prediction_type": "epsilon",
    }
    assert {name: pipeline.scheduler.config[name] for name in wanted} == wanted
    for blocks in (pipeline.unet.down_blocks, pipeline.unet.up_blocks, [pipeline.unet.mid_block]):
        assert any(getattr(block, "has_cross_attention", False) for block in blocks)
    tokens = pipeline.tokenizer("a red circle on a white background", padding="max_length").input_ids
    assert len(tokens) == 77 == pipeline.tokenizer.model_max_length


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_random_pipeline_draws_and_hears_its_prompt(random_folder, guidance_scale):
    pipeline = StableDiffusionXLPipeline.from_pretrained(random_folder)
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            f"a {colour} circle on a white background",
            num_inference_steps=2,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        for colour in ("red", "red", "blue")
    ]
    assert images[0].shape == (1, 32, 32, 3) and np.isfinite(images[0]).all()
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_building_is_repeatable_and_leaves_the_callers_generator_alone(tmp_path, random_folder):
    state = torch.get_rng_state()
    build_random_sdxl(tmp_path / "again")
    build_random_sdxl(tmp_path / "other", seed=1, prediction_type="v_prediction")
    assert torch.equal(state, torch.get_rng_state())
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (random_folder / weights).read_bytes()
    assert (tmp_path / "other" / weights).read_bytes() != (random_folder / weights).read_bytes()
    assert DDIMScheduler.from_pretrained(tmp_path / "other", subfolder="scheduler").config.prediction_type == (
        "v_prediction"
    )


def test_standardising_latents_keeps_every_reconstruction(random_folder):
    vae = StableDiffusionXLPipeline.from_pretrained(random_folder).vae
    images = torch.from_numpy(drawings(all_captions())).permute(0, 3, 1, 2).float() * 2 - 1
    before = reconstruct(vae, images)
    standardise_latents(vae, images)
    latents = encode_images(vae, images) * vae.config.scaling_factor
    np.testing.assert_allclose(reconstruct(vae, images), before, atol=1e-5)
    np.testing.assert_allclose(latents.mean(dim=(0, 2, 3)), 0.0, atol=1e-3)
    np.testing.assert_allclose(latents.std(), 1.0, atol=1e-2)


@pytest.mark.slow
def test_training_for_a_few_steps_gives_the_same_pipeline_twice(tmp_path):
    """The user's door, cut to a handful of steps: it trains, saves whole folders, and repeats itself exactly."""
    data = tmp_path / "data"
    assert make_dataset(["--output_dir", str(data), "--num_images", "60", "--captions", "all"]) == 0
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
