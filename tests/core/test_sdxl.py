"""Loading and encoding: which precision the decoders get, what names weights in a cache key, encoders and generation
against the pipeline of diffusers, guidance, and the states of a path in slices."""

import os
import shutil
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor, XFormersAttnProcessor

from sharpening import model_source, sdxl
from sharpening.errors import UserError
from sharpening.model_source import Source
from sharpening.trajectory import Path, Schedule, generate
from tests.support.objective import problem
from tiny_world.make_tiny_sdxl import make_pipeline

CPU = torch.device("cpu")


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
    vae = sdxl.load_decoder(Source("pretrained_model_name_or_path", str(tmp_path)), "vae", CPU, asked)
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
    decoder = sdxl.load_decoder(Source("reward_vae", str(tmp_path / "taesd")), None, CPU, torch.float16)
    assert isinstance(decoder, AutoencoderTiny) and decoder.dtype == torch.float16


@pytest.mark.parametrize("adapter", [None, sdxl.lora_config(4, None)])
def test_attention_without_a_kernel_is_refused_when_it_is_switched_on(adapter, world):
    """xformers on a new card: diffusers can switch it on, and the first forward fails as it does here on the CPU."""
    unet = sdxl.load_unet(Source("pretrained_model_name_or_path", str(world.model)), CPU, torch.float32, adapter)
    unet.enable_xformers_memory_efficient_attention = lambda: unet.set_attn_processor(XFormersAttnProcessor())
    said = (
        r"^--enable_xformers_memory_efficient_attention does not work here \(NotImplementedError: No operator found .*"
    )
    with pytest.raises(
        UserError, match=f"{said}switch it off with --no-enable_xformers_memory_efficient_att"
    ) as caught:
        sdxl.switch_attention(unet, ["enable_xformers_memory_efficient_attention"], CPU, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_works_is_tried_without_a_trace(dtype, world):
    source, tried = Source("pretrained_model_name_or_path", str(world.model)), []
    for unet in (sdxl.load_unet(source, CPU, dtype), sdxl.load_frozen_unet(source, CPU, dtype)):
        unet.enable_plain_attention = partial(unet.set_attn_processor, AttnProcessor())
        projection = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
        hook = projection.register_forward_hook(lambda module, inputs, output: tried.append(output.dtype))
        state = torch.get_rng_state()
        sdxl.switch_attention(unet, ["enable_plain_attention"], CPU, dtype)
        hook.remove()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in unet.parameters())
    assert tried == [dtype, dtype]


def test_cache_identity_changes_with_the_weights(world, tmp_path):
    shutil.copytree(world.model, tmp_path / "model")
    source = Source("pretrained_model_name_or_path", str(tmp_path / "model"))
    vae, text = source.identity("vae"), model_source.text_identity(source)
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert source.identity("vae") != vae
    assert model_source.text_identity(source) == text
    hub = [Source("flag", "owner/model", revision) for revision in (None, "main", "v2")]
    assert hub[0].identity("vae") == hub[1].identity("vae") != hub[2].identity("vae")


def test_encoders_and_generation_equal_the_diffusers_pipeline(world):
    pipeline = StableDiffusionXLPipeline.from_pretrained(world.model)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    source = Source("pretrained_model_name_or_path", str(world.model))
    encoders = sdxl.TextEncoders.load(source, CPU, torch.float32)
    prompts = ["a red circle on a white background", "words outside of the grammar, and more of them " * 20]
    embeds, pooled = encoders.encode(prompts)
    expected_embeds, _, expected_pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    torch.testing.assert_close(embeds, expected_embeds)
    torch.testing.assert_close(pooled, expected_pooled)

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = Schedule.from_config(source.read_json("scheduler/scheduler_config.json"), 5)
    condition = sdxl.Condition(embeds, pooled, sdxl.default_time_ids(2, 32, CPU))
    unconditional = sdxl.unconditional_embedding(source, encoders)
    model = sdxl.branch_model(pipeline.unet, condition, unconditional, 5.0)
    with torch.no_grad():
        ours = sdxl.decode_latents(pipeline.vae, generate(model, schedule, noise), 1)
    theirs = pipeline(
        prompts, num_inference_steps=5, guidance_scale=5.0, latents=noise, output_type="pt", height=32, width=32
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_states_of_a_path_are_predicted_with_their_branch(batch_size):
    unet, condition, x_0, eps, t = problem(make_pipeline(seed=0), 3, 1, torch.float32)
    x, times = torch.stack([x_0, eps], 1), torch.stack([t, t // 2], 1)
    path = Path(x, times, torch.ones(3, 2, dtype=torch.bool))
    with torch.no_grad():
        output = sdxl.predict_along(unet, path, condition, batch_size)
        for row in range(3):
            own = condition.rows(torch.tensor([row, row]))
            expected = sdxl.predict_output(unet, x[row], times[row], own)
            torch.testing.assert_close(output[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
def test_guidance_asks_with_and_without_prompt_for_the_same_rows(gradient):
    """In one forward where no gradient is kept, in two where one is; the unconditional part has none."""
    unet, condition, x_0, _, t = problem(make_pipeline(seed=0), 3, 1, torch.float32)
    nothing = sdxl.Unconditional(torch.ones_like(condition.embeds[:1]), torch.ones_like(condition.pooled[:1]))
    seen = []
    unet.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    with torch.set_grad_enabled(gradient):
        model = sdxl.Denoiser(unet, condition, nothing, 3.0).rows(torch.tensor([2, 0]))
        rows = (x_0[[2, 0]], t[[2, 0]])
        output = model.predict(*rows)
        guided = model.guide(output, *rows)
    assert seen == ([(2, True), (2, False)] if gradient else [(4, False)])
    with torch.no_grad():
        plain, without = (
            sdxl.predict_output(unet, *rows, part.rows(torch.tensor([2, 0])))
            for part in (condition, condition.without_prompt(nothing))
        )
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided, without + 3 * (plain - without), rtol=1e-4, atol=1e-4)


def test_prompts_are_dropped_where_marked():
    _, condition, *_ = problem(make_pipeline(seed=0), 3, 1, torch.float32)
    nothing = sdxl.Unconditional(torch.ones_like(condition.embeds[:1]), torch.zeros_like(condition.pooled[:1]))
    dropped = condition.without_prompt(nothing, torch.tensor([False, True, False]))
    assert torch.equal(dropped.embeds[[0, 2]], condition.embeds[[0, 2]]) and (dropped.embeds[1] == 1).all()
    assert torch.equal(dropped.pooled[[0, 2]], condition.pooled[[0, 2]]) and (dropped.pooled[1] == 0).all()
    assert torch.equal(dropped.time_ids, condition.time_ids)
