"""The tiny SDXL with random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from tiny_world import signs
from tiny_world.shapes import all_captions
from tiny_world.tiny_sdxl import build_random_sdxl, make_tokenizer


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


def test_every_word_of_a_sign_is_one_token():
    tokenizer = make_tokenizer("<|endoftext|>", "signs")
    for caption in signs.all_captions():
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2


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
