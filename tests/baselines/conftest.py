"""What the tests of the baselines share: a short command line, and what a run's models saw, by the hooks of torch."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map

from sharpening import sdxl
from tests.baselines.literal import CAPTIONS
from tests.support.objective import double_precision
from tests.support.runs import SCRIPTS


@pytest.fixture
def script(method):
    """The module of the script."""
    return importlib.import_module(SCRIPTS[method].removesuffix(".py").replace("/", "."))


@pytest.fixture
def prompts(tmp_path):
    """Flags that make `CAPTIONS` the data."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return {"train_data_dir": None, "prompts_file": path}


@pytest.fixture
def quick(method):
    """The flags of a run of few forwards."""
    steps = {"DDPO": {"infer_steps": 3, "trajectory_nums": 1}, "D3PO": {"infer_steps": 3}}
    return {"num_noisy_latents": 2, **steps.get(method, {"infer_steps": 2})}


@pytest.fixture
def in_double(monkeypatch):
    """Runs compute in float64, but for the VAE and the reward, whose results are data."""

    def cast(unet, args, kwargs):
        def double(part):
            return part.double() if torch.is_tensor(part) and part.is_floating_point() else part

        return tree_map(double, (args, kwargs))

    def doubling(load):
        def loaded(*args):
            unet = double_precision(SimpleNamespace(unet=load(*args).double())).unet
            unet.register_forward_pre_hook(cast, with_kwargs=True)
            return unet

        return loaded

    for name in ("load_unet", "load_frozen_unet"):
        monkeypatch.setattr(sdxl, name, doubling(getattr(sdxl, name)))
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **options: randn(*size, dtype=torch.float64, **options))


@pytest.fixture
def seen(monkeypatch):
    """What all runs of a test did, in order.

    forwards: of UNets, each with its `unet`, `purpose` ("generate", "reference" or "train"), `x`, `t`, `condition`,
        `output`, and the `step` it belongs to, counted from 0 on through all runs.
    decodes: the images (R, 3, H, W) of each forward of the decoder, in [-1, 1].
    updates: one for each optimizer step, with the `gradient` (flat), the `weights`, and how many of them have a
        `state` in the optimizer, all as they were before it.
    """
    record = SimpleNamespace(forwards=[], decodes=[], updates=[])
    trained = []
    load = sdxl.load_unet
    monkeypatch.setattr(sdxl, "load_unet", lambda *args: trained.append(load(*args)) or trained[-1])

    def look(module, args, kwargs, output):
        if isinstance(module, Decoder):
            record.decodes.append(output.detach())
        if not isinstance(module, UNet2DConditionModel):
            return
        purpose = "train" if torch.is_grad_enabled() else "reference" if trained[-1].training else "generate"
        added = kwargs["added_cond_kwargs"]
        condition = sdxl.Condition(kwargs["encoder_hidden_states"], added["text_embeds"], added["time_ids"])
        record.forwards.append(
            SimpleNamespace(
                unet=module, purpose=purpose, x=args[0].clone(), t=args[1].clone(), condition=condition,
                output=output[0].detach().clone(), step=len(record.updates),
            )
        )  # fmt: skip

    def update(optimizer, args, kwargs):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        record.updates.append(
            SimpleNamespace(
                gradient=torch.cat([parameter.grad.flatten() for parameter in parameters]),
                weights=[parameter.detach().clone() for parameter in parameters],
                state=len(optimizer.state),
            )
        )

    handles = [register_module_forward_hook(look, with_kwargs=True), register_optimizer_step_pre_hook(update)]
    yield record
    for handle in handles:
        handle.remove()
