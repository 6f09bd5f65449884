"""The benchmark of a step counts the work of the method."""

import dataclasses
import json
import subprocess
import sys
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import naive, step
from benchmarks.models import write_pipeline
from benchmarks.rivals import Rivals
from benchmarks.script import Setting
from sharpening.errors import UserError
from tests.support.objective import problem
from tests.support.runs import ROOT
from tiny_world.tiny_sdxl import make_pipeline


def flops_of(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "rlhf"])
def test_work_is_that_of_the_method(method, benchmark_run, tmp_path):
    """In forwards, backwards and decodes of a row."""
    output = tmp_path / "step.json"
    printed = benchmark_run(
        "step", "--model", "tiny", "--method", method, "--rounds", 2, "--num_noisy_latents", 4, "--output", output,
        "--latents_per_prompt", 1,
    )  # fmt: skip
    found = json.loads(output.read_text())
    pipeline = make_pipeline(seed=0)
    _, condition, x_0, _, _ = problem(pipeline, 1, 1, torch.float32, size=8)
    trained = flops_of(lambda: naive.forward(pipeline.unet, x_0, 5, condition).sum().backward())
    with torch.no_grad():
        forward = flops_of(lambda: naive.forward(pipeline.unet, x_0, 5, condition))
        decode = flops_of(lambda: pipeline.vae.decode(x_0))
    n, m, steps = 4, 3, 25
    generated, compared, pair = (steps, 2 * m, 2) if method == "rlhf" else (0, 0, 1)
    expected = {
        "script": (generated + n * m + compared) * forward + pair * m * trained + n * m * decode,
        "plain": trained,
        "branch_step": forward + decode,
        "score": n * m * forward,
    }
    assert {name: found["flops"][name] for name in expected} == {
        name: pytest.approx(count, rel=0.002) for name, count in expected.items()
    }
    # Through the sampler a later step's gradient reaches the first layer's input, too.
    literal = ((n * steps + n * m if method == "rlhf" else 0) * forward) + n * m * (trained + decode)
    assert 1 <= found["flops"]["naive"] / literal < 1.03
    assert found["peak_bytes"]["script"] < found["peak_bytes"]["naive"]
    assert set(found["operators"]) == {"script", "naive", "plain", "branch_step"}
    assert found["operators"]["branch_step"] < found["operators"]["plain"] < found["operators"]["script"]
    for seconds, phases in zip(found["seconds"]["script"], found["phases"], strict=True):
        assert seconds == pytest.approx(sum(phases.values()))
        assert {"score", "decode", "reward", "train", "optimizer"} <= set(phases)
        assert (method == "rlhf") == ("generate" in phases) == ("reference" in phases)
    assert "cores" in found["machine"] and "torch" in found["machine"]
    assert "against naive: " in printed and "against plain: " in printed


@pytest.mark.slow
def test_configurations_of_the_scripts_are_taken(benchmark_run):
    switches = ["--use_lora", "--gradient_checkpointing", "--decoder", "tiny", "--mixed_precision", "bf16"]
    printed = benchmark_run("step", "--model", "tiny", "--method", "rlhf", "--rounds", 1, "--batch", 2, *switches)
    assert "reference 0." in printed  # its adapter off, the UNet that trains is the reference


@pytest.mark.parametrize(
    ("flag", "gpu", "measured"), [(None, False, True), (None, True, False), (True, True, True), (False, False, False)]
)
def test_the_literal_reading_is_left_out_on_a_gpu_unless_asked_for(flag, gpu, measured):
    assert step.rivals_for(flag, gpu) == (("naive",) if measured else ()) + ("plain", "branch_step")


# Asks for 4 PiB in the second step, when it has a first one behind it. Then the whole benchmark.
OUT_OF_MEMORY = """
import sys
import torch
from benchmarks import step
from benchmarks.rivals import Rivals

real, calls = Rivals.plain, []

def plain(self):
    calls.append(real(self))
    if len(calls) == 2:
        torch.empty(2**50)
    assert len(calls) == 1

Rivals.plain = plain
sys.exit(step.main(sys.argv[1:]))
"""


def test_rival_that_runs_out_of_memory_is_reported_and_the_others_go_on(tmp_path):
    output = tmp_path / "step.json"
    command = [sys.executable, "-c", OUT_OF_MEMORY, "--model=tiny", "--rounds=1", "--no-naive", f"--output={output}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(output.read_text())
    assert "can't allocate memory" in found["out_of_memory"]["plain"]
    for figure in ("seconds", "flops", "operators", "peak_bytes"):
        assert found[figure].keys() - {"score"} == {"script", "branch_step"}
    assert "plain  ran out of memory: " in ran.stdout and "against" not in ran.stdout


# The script loads the first UNet; for another there is no memory. Then the whole benchmark.
NO_SECOND_UNET = """
import sys
import torch
from benchmarks import step
from sharpening import sdxl

real, calls = sdxl.load_unet, []

def load_unet(*args):
    calls.append(args)
    if len(calls) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return real(*args)

sdxl.load_unet = load_unet
sys.exit(step.main(sys.argv[1:]))
"""


def test_script_is_measured_where_no_rival_can_be_made(tmp_path):
    output = tmp_path / "step.json"
    command = [sys.executable, "-c", NO_SECOND_UNET, "--model=tiny", "--rounds=1", f"--output={output}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(output.read_text())
    assert set(found["out_of_memory"]) == set(step.RIVALS)
    for figure in ("seconds", "flops", "operators", "peak_bytes"):
        assert set(found[figure]) == {"script"}
    assert ran.stdout.count("ran out of memory: OutOfMemoryError: CUDA out of memory") == 3


@pytest.fixture
def rivals(tmp_path):
    setting = Setting.of(
        {field.name: None for field in dataclasses.fields(Setting)}
        | {"method": "rlhf", "model": "tiny", "batch": 1, "num_noisy_latents": 2, "trajectory_nums": 1}
        | {"mixed_precision": "no", "decoder": "tiny"}
    )
    write_pipeline("tiny", tmp_path, torch.float32)
    return Rivals(setting, tmp_path)


def measured(rivals):
    """A first step of the script that does nothing, and of the rivals beside it."""
    measurement = step.Measurement({name: getattr(rivals, name) for name in step.RIVALS}, rivals.keep)
    with measurement.visit(0):
        pass
    return measurement


def test_rival_without_memory_leaves_none_of_what_it_alone_held(rivals, monkeypatch):
    held = []

    def walk(unet, vae, scheduler, reward, branches, steps, reference):
        held.extend(map(weakref.ref, (unet, vae, reference)))
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(naive, "walk", walk)
    measurement = measured(rivals)
    assert "ALLOC_FAILED" in measurement.result["out_of_memory"]["naive"]
    assert [part() is None for part in held] == [False, True, True]  # the others train that UNet
    assert set(measurement.beside) == {"plain", "branch_step"}


def test_optimizer_that_cannot_be_made_stops_those_that_need_it(rivals, monkeypatch):
    def make_adam(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("benchmarks.rivals.make_adam", make_adam)
    measurement = measured(rivals)
    assert set(measurement.beside) == {"branch_step"}
    assert all(parameter.grad is None for parameter in rivals.unet.parameters())


def test_other_failure_of_a_rival_is_no_lack_of_memory():
    def work():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="do not fit"), step.Measurement({"plain": work}).visit(step.TIMED):
        pass


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds is 0, but it must be at least 1"),
        (["--resolution", "0"], "--resolution is 0, but it must be at least 1, or left out"),
        (["--model", "tiny", "--resolution", "36"], "--resolution is 36, but SDXL needs a positive multiple of 8"),
        (["--model", "tiny", "--method", "rlhf", "--num_noisy_latents", "1"], "a preference needs 2 branches or more"),
    ],
)
def test_mistake_is_told_in_one_sentence(flags, message):
    with pytest.raises(UserError, match=message):
        step.main(flags)
