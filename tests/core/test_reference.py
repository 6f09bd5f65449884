"""The reference at any time: the UNet as it was when training, or its round, began; of a copy and of an adapter."""

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel

from sharpening import model_source, sdxl
from sharpening.reference import Reference
from tests.support.objective import problem
from tiny_world.make_tiny_sdxl import make_pipeline


@pytest.fixture(params=["full", "LoRA"])
def lora(request):
    return request.param == "LoRA"


@pytest.fixture
def make(lora, world):
    """Make a UNet that trains, as the scripts load it, and its reference."""
    source, cpu = model_source.Source("pretrained_model_name_or_path", str(world.model)), torch.device("cpu")

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = sdxl.load_unet(source, cpu, torch.float32, sdxl.lora_config(4, None) if lora else None)
        return unet, Reference(unet, None if lora else sdxl.load_frozen_unet(source, cpu, torch.float32))

    return make


@cache
def inputs():
    return problem(make_pipeline(seed=0), 4, 1, torch.float32)[1:]


def outputs(unet):
    condition, x_0, _, t = inputs()
    with torch.no_grad():
        return sdxl.predict_output(unet, x_0, t, condition)


def of_reference(reference):
    with reference.unet() as unet:
        return outputs(unet)


def train(unet, steps=1, optimizer=None):
    """Move the weights that train, as a script does: by an optimizer that keeps a state."""
    optimizer = optimizer or torch.optim.AdamW(sdxl.trainable_parameters(unet), lr=1e-2)
    condition, x_0, eps, t = inputs()
    for _ in range(steps):
        (sdxl.predict_output(unet, x_0, t, condition) - eps).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_it_is_the_base_model_bit_for_bit_whatever_the_model_has_become(make, world):
    unet, reference = make()
    base = outputs(UNet2DConditionModel.from_pretrained(world.model, subfolder="unet"))
    assert torch.equal(of_reference(reference), base)
    assert torch.equal(outputs(unet), base)  # an adapter begins as the identity
    train(unet, 2)
    trained = outputs(unet)
    assert not torch.allclose(trained, base, atol=1e-2)
    assert torch.equal(of_reference(reference), base)
    assert torch.equal(outputs(unet), trained)  # outside the training weights are in force again


def test_renewed_it_is_the_model_as_it_was_then(make):
    unet, reference = make()
    optimizer = train(unet)
    for _ in range(2):
        begun = outputs(unet)
        reference.renew()
        assert torch.equal(of_reference(reference), begun)
        train(unet, 2, optimizer)
        trained = outputs(unet)
        assert not torch.allclose(trained, begun, atol=1e-2)
        assert torch.equal(of_reference(reference), begun)
        assert torch.equal(outputs(unet), trained)


def test_training_goes_on_as_if_it_had_not_been_looked_at(make):
    (watched, reference), (alone, _) = make(), make()
    first, second = train(watched), train(alone)
    reference.renew()
    for _ in range(2):
        of_reference(reference)
        train(watched, 1, first)
        of_reference(reference)
        train(alone, 1, second)
    weights = sdxl.trainable_parameters(watched)
    assert all(map(torch.equal, weights, sdxl.trainable_parameters(alone)))
    assert len(weights) == len(first.state) and all(weight in first.state for weight in weights)
    assert all(weight.requires_grad for weight in weights)


@pytest.mark.parametrize("renewed", [False, True], ids=["at first", "renewed"])
def test_a_failure_within_leaves_the_training_weights_in_force(renewed, make):
    unet, reference = make()
    train(unet)
    if renewed:
        reference.renew()
    expected = of_reference(reference)
    train(unet)
    trained = outputs(unet)
    with pytest.raises(RuntimeError, match="out of memory"), reference.unet():
        raise RuntimeError("out of memory")
    assert torch.equal(outputs(unet), trained)
    assert torch.equal(of_reference(reference), expected)


@pytest.mark.parametrize("renewed", [False, True], ids=["at first", "renewed"])
def test_its_state_makes_another_the_same_reference(renewed, make, tmp_path):
    """Through a file, and beside a model that has gone on: a checkpoint holds both."""
    unet, reference = make()
    train(unet)
    if renewed:
        reference.renew()
    expected = of_reference(reference)
    train(unet)
    torch.save(reference.state(), tmp_path / "state.pt")
    resumed, other = make()
    resumed.load_state_dict(unet.state_dict())
    other.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(of_reference(other), expected)
    assert torch.equal(outputs(resumed), outputs(unet))
    train(resumed)
    assert torch.equal(of_reference(other), expected)
    other.renew()
    assert torch.equal(of_reference(other), outputs(resumed))


def test_a_copy_takes_no_gradient_and_an_adapter_needs_no_copy(make, lora):
    unet, reference = make()
    reference.renew()
    with reference.unet() as frozen:
        assert (frozen is unet) == lora
        if not lora:
            assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert len(reference.state()) == len(sdxl.trainable_parameters(unet))


def test_a_copy_in_half_precision_is_renewed_in_it(world):
    """Under autocast the copy computes what the model does: its norms are in float32, all else is rounded alike."""
    source, cpu = model_source.Source("pretrained_model_name_or_path", str(world.model)), torch.device("cpu")
    unet = sdxl.load_unet(source, cpu, torch.float32)
    reference = Reference(unet, sdxl.load_frozen_unet(source, cpu, torch.bfloat16))
    train(unet)
    reference.renew()
    with torch.autocast("cpu", torch.bfloat16):
        ours = of_reference(reference)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(unet), ours)
    with reference.unet() as frozen:
        assert frozen.conv_in.weight.dtype == torch.bfloat16 and frozen.conv_norm_out.weight.dtype == torch.float32
