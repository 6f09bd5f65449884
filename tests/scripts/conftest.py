"""What the tests of whole runs share: hooks on the models, and gradients as the optimizer gets them."""

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder

from tests.support.hooks import rows_through, unet_forwards


@pytest.fixture
def forwards():
    """Every forward of a UNet."""
    with unet_forwards() as seen:
        yield seen


@pytest.fixture
def decodes():
    """The rows of every forward of a VAE's decoder."""
    with rows_through(Decoder) as seen:
        yield seen


@pytest.fixture
def encodes():
    """The rows of every forward of a VAE's encoder."""
    with rows_through(Encoder) as seen:
        yield seen


@pytest.fixture
def gradients(monkeypatch):
    """The gradient of every optimizer step, before clipping."""
    from accelerate import Accelerator

    seen = []
    clip = Accelerator.clip_grad_norm_

    def record(self, parameters, *args, **kwargs):
        parameters = list(parameters)
        seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).clone())
        return clip(self, parameters, *args, **kwargs)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", record)
    return seen


@pytest.fixture(scope="module")
def known_gradients():
    return {}


@pytest.fixture
def first_gradient(method, train, flags, tmp_path, gradients, known_gradients):
    """The gradient of the first step under some flags, from one run for all tests of a module that ask for it."""

    def of(**changes):
        key = (method, repr(changes))
        if key not in known_gradients:
            gradients.clear()
            assert train(flags(**changes, max_train_steps=1, output_dir=tmp_path / str(len(known_gradients)))) == 0
            known_gradients[key] = gradients[0]
        return known_gradients[key]

    return of
