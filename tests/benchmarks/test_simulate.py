"""The simulated GPU is asked for what the real step does: operators, FLOPs and memory are those of a CPU's step."""

import json
from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils import _foreach_utils
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.measuring import OperatorCount
from benchmarks.memory import LiveMemory
from benchmarks.models import write_pipeline
from benchmarks.script import Setting, each_step, write_data
from benchmarks.simulate import GPUS, busy_seconds, figures, simulate
from benchmarks.simulated_gpu import SimulatedGPU, Work

aten = torch.ops.aten
# A CPU's attention kernel, and the simulated GPU's in float32.
KERNELS = {
    f"aten._scaled_dot_product_{cpu}{suffix}": f"aten._scaled_dot_product_{gpu}{suffix}"
    for cpu, gpu in [("flash_attention_for_cpu", "efficient_attention")]
    for suffix in (".default", "_backward.default")
}


def setting_of(method, **changes):
    flags = {
        "method": method, "model": "tiny", "resolution": 64, "batch": 2, "num_noisy_latents": 3, "trajectory_nums": 3,
        "latents_per_prompt": "1", "mixed_precision": "no", "decoder": "tiny", "score_batch_size": 4,
        "decode_batch_size": 2, "use_lora": False, "gradient_checkpointing": False, "use_8bit_adam": False,
        "rounds": 0,
    }  # fmt: skip
    return Setting(**{**flags, **changes})


def raw(formula):
    """A formula of the registry as `custom_mapping` takes it: told tensors, not shapes."""
    told = partial(formula)
    told._get_raw = True
    return told


def counted_on_cpu(setting, folder):
    """Operators, FLOPs and peak bytes of the script's second step with real tensors."""
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: raw(flop_registry[aten._scaled_dot_product_flash_attention]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: raw(
            flop_registry[aten._scaled_dot_product_flash_attention_backward]
        ),
    }
    found = {}

    @contextmanager
    def visit(index):
        if index != 1:
            yield
            return
        flops = FlopCounterMode(display=False, custom_mapping=attention)
        with flops, LiveMemory() as memory, OperatorCount() as operators:
            yield
        names = Counter()
        for name, count in operators.names.items():
            names[KERNELS.get(name, name)] += count
        found.update(names=names, flops=flops.get_total_flops(), peak=memory.peak)

    write_pipeline(setting.model, folder / "model", torch.float32)
    write_data(folder / "data", setting.resolution)
    with each_step(visit):
        assert setting.script.cli(setting.command(folder, 2)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method, changes", [("sft", {}), ("rlhf", {"use_lora": True}), ("sft", {"decoder": "vae"})])
def test_step_is_the_one_of_a_cpu(method, changes, tmp_path, monkeypatch):
    # On CUDA gradients are clipped by foreach operators; here a CPU has them, too.
    monkeypatch.setattr(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["cuda", "cpu"])
    setting = setting_of(method, **changes)
    real, simulated = counted_on_cpu(setting, tmp_path), simulate(setting)
    names = simulated.names + simulated.host
    # On CUDA a group norm copies what has its channels last: 17 of them in a decode of the tiny VAE's 9.
    copies = 17 * 9 if setting.decoder == "vae" else 0
    # On a GPU the metrics that lie there are put together, to be copied to the host at once.
    assert names - real["names"] == Counter({"aten.cat.default": 1, "aten.clone.default": copies})
    assert real["names"] - names == {}
    assert figures(simulated.work)["tflop"] * 1e12 == pytest.approx(real["flops"], rel=1e-9)
    peak = max(simulated.peaks.values()) - simulated.held
    assert 0.88 * real["peak"] <= peak <= real["peak"]  # less: what a CPU's step holds on the host is not the GPU's


@pytest.mark.slow
def test_command_writes_all_figures(benchmark_run, tmp_path):
    output = tmp_path / "simulated.json"
    flags = ["--model", "tiny", "--method", "rlhf", "--mixed_precision", "bf16", "--gradient_accumulation_steps", 2]
    printed = benchmark_run("simulate", *flags, "--gradient_checkpointing", "--output", output)
    found = json.loads(output.read_text())
    phases = {"generation", "score", "decode", "reference", "train", "optimizer", "rest"}
    assert set(found["phases"]) == phases
    for name in ("launches", "casts", "cast_gb", "moved_gb", "tflop", "waits"):
        assert found[name] == pytest.approx(sum(phase[name] for phase in found["phases"].values()))
        assert found[name] > 0
    assert found["peak_gib"] == max(phase["peak_gib"] for phase in found["phases"].values()) > found["held_gib"] > 0
    assert set(found["estimate"]) == {"RTX 4090", "A100", "H100"}
    for card in found["estimate"].values():
        bounds = [max(phase["launching"], phase["busy"]) for phase in card["phases"].values()]
        assert card["seconds"] == pytest.approx(sum(bounds)) and card["assumed"]["bandwidth"] > 1e11
    # Autocast converts in every forward, and not in the decoder, whose dtype is its own.
    assert found["phases"]["train"]["casts"] > 0 and found["phases"]["decode"]["casts"] == 0
    assert found["settings"]["gradient_accumulation_steps"] == "2"
    assert "estimate, not a measurement" in printed and "8 us a launch" in printed and "made up" in printed


def test_autocast_is_that_of_cuda():
    with SimulatedGPU() as gpu:
        layer = torch.nn.Linear(8, 8).to("cuda")
        gpu.adopt([*layer.parameters()])
        with torch.autocast("cuda", torch.bfloat16):
            output = layer(layer(torch.ones(2, 8, device="cuda")))
            normed = torch.nn.functional.layer_norm(output, (8,))
        gpu.start()
        normed.sum().backward()
    assert (output.dtype, normed.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert gpu.names["aten.native_layer_norm_backward.default"] == 1
    assert gpu.names["aten._to_copy.default"] == 3  # gradients of the norm's input, of the weight and of the bias


def test_memory_is_held_until_it_is_freed_and_views_take_none():
    with SimulatedGPU() as gpu:
        first = torch.zeros(1000, device="cuda")
        second = first.view(10, 100)[2:]
        assert gpu.live == 4000
        del first
        assert gpu.live == 4000
        with gpu.during("more"):
            second = second + 1
        assert (gpu.live, gpu.peaks["more"]) == (3200, 7200)


def test_what_crosses_to_the_host_is_real_and_waits():
    with SimulatedGPU() as gpu:
        values = torch.arange(6.0).to("cuda")
        assert values.cpu().isfinite().all() and len(values.tolist()) == 6
        assert bool((values > 0).any()) and float(values.sum()) == 0
        assert values[torch.tensor([True] * 2 + [False] * 4)].shape == (2,)
    assert gpu.transfers.total() == 3 and gpu.waits.total() == 4  # one transfer leads to the device
    assert gpu.host["aten.arange.default"] == 1 and gpu.names["aten.gt.Scalar"] == 1
    assert not torch.cuda.is_available() and torch.tensor([1.0]).tolist() == [1.0]


def test_an_operator_takes_the_longer_of_arithmetic_and_memory():
    card = GPUS["H100"]
    computing = Work("train", int(0.6 * 989e12), True, 1, False)
    moving = Work("train", 1, True, int(0.8 * 3.35e12), False)
    assert busy_seconds(Counter({computing: 2, moving: 3}), card) == pytest.approx(5)
    assert busy_seconds(Counter({computing._replace(low_precision=False): 1}), card) == pytest.approx(989 / 66.9)
