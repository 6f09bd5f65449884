"""Loading: which precision the decoders get, and what names weights in a cache key."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from sharpening import model_source, sdxl

CPU = torch.device("cpu")


def arguments(**flags):
    names = ("pretrained_vae_model_name_or_path", "reward_vae", "cache_dir")
    return SimpleNamespace(**{name: flags.get(name) for name in names})


@pytest.mark.parametrize(
    ("force_upcast", "asked", "given"),
    [
        (True, torch.float16, torch.float32),
        (False, torch.float16, torch.float16),
        (True, torch.bfloat16, torch.bfloat16),
        (True, torch.float32, torch.float32),
    ],
)
def test_vae_is_upcast_only_where_float16_overflows(force_upcast, asked, given, tmp_path):
    original = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8, force_upcast=force_upcast)
    original.save_pretrained(tmp_path / "vae")
    args = arguments(pretrained_vae_model_name_or_path=str(tmp_path / "vae"))
    vae = sdxl.load_vae(args, model_source.Source("pretrained_model_name_or_path", "unused/model"), CPU, asked)
    assert vae.dtype == given
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    for loaded, saved in zip(vae.parameters(), original.parameters(), strict=True):
        assert torch.equal(loaded, saved.to(given))  # not rounded to float16 on the way to float32


def test_taesd_decodes_in_half_precision(tmp_path):
    AutoencoderTiny(
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    ).save_pretrained(tmp_path / "taesd")
    decoder = sdxl.load_reward_decoder(arguments(reward_vae=str(tmp_path / "taesd")), CPU, torch.float16)
    assert isinstance(decoder, AutoencoderTiny) and decoder.dtype == torch.float16


def test_cache_identity_changes_with_the_weights(world, tmp_path):
    import os
    import shutil

    shutil.copytree(world.model, tmp_path / "model")
    source = model_source.Source("pretrained_model_name_or_path", str(tmp_path / "model"))
    vae, text = model_source.vae_identity(arguments(), source), model_source.text_identity(source)
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert model_source.vae_identity(arguments(), source) != vae
    assert model_source.text_identity(source) == text
    hub = [model_source.Source("flag", "owner/model", revision) for revision in (None, "main", "v2")]
    assert hub[0].identity("vae") == hub[1].identity("vae") != hub[2].identity("vae")
