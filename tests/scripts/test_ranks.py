"""Several processes and machines: shared validation, what accelerate's config may not change, the loss scale."""

import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sharpening.running import launching
from tests.support.runs import ROOT, SCRIPTS, metrics, same_tensors, without_speed

PROMPTS = [
    "a red circle on a white background",
    "a blue square on a black background",
    "a green circle on a white one",
]
# Leaves a note of who judged how many images of which prompt; the prompt that rank 1 cannot judge is never trained on.
NOTING_REWARD = """
import os
from pathlib import Path

def noting(images, prompts):
    rank = os.environ.get("RANK", "0")
    if rank == "1" and any("unlucky" in prompt for prompt in prompts):
        raise OSError("rank 1 fell over")
    with open(Path(__file__).with_name(f"judged-{rank}.txt"), "a") as file:
        file.writelines(f"{prompt}\\n" for prompt in prompts)
    return images.mean((1, 2, 3))
"""
SHOWING_BUCKETS = """
import runpy, sys
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

zero_grad = AcceleratedOptimizer.zero_grad
clip = Accelerator.clip_grad_norm_

def show(self, parameters, *args):
    parameters = list(parameters)
    storages = {parameter.grad.untyped_storage().data_ptr() for parameter in parameters}
    print(f"GRADIENTS {len(parameters)} STORAGES {len(storages)}", flush=True)
    return clip(self, parameters, *args)

def zero(self, *args, **options):
    zero_grad(self, *args, **options)
    kept = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
    print(f"KEPT {len(kept)}", flush=True)

Accelerator.clip_grad_norm_, AcceleratedOptimizer.zero_grad = show, zero
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def validating(tmp_path):
    """Changes of a command line: 5 images in slices of 2, weights that do not move, a reward that takes notes."""
    (tmp_path / "mine.py").write_text(NOTING_REWARD)
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a yellow circle", "a red square"]))
    return {
        "reward_model": f"{tmp_path}/mine.py:noting", "validation_prompts_file": tmp_path / "prompts.txt",
        "num_validation_images": 1, "validation_steps": 1, "score_batch_size": 2, "max_train_steps": 1,
        "learning_rate": 1e-30, "use_ema": True,
    }  # fmt: skip


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(command, *words, port=None, timeout=240):
    scripts = Path(sys.executable).parent
    return subprocess.run(
        [str(scripts / "torchrun"), *words, f"--master_port={port or free_port()}", *map(str, command)],
        capture_output=True, text=True, timeout=timeout, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def two_machines(command_of):
    """What torchrun answers on two machines of one process, which `command_of(n)` gives their flags."""
    port = free_port()

    def start(number):
        words = ["--nnodes=2", f"--node_rank={number}", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        return torchrun([ROOT / SCRIPTS["SFT"], *command_of(number)], *words, port=port)

    with ThreadPoolExecutor(2) as pool:
        return [*pool.map(start, range(2))]


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_ranks_share_validation_and_draw_what_one_draws(train, flags, validating, tmp_path):
    assert train(flags(**validating, train_batch_size=4, output_dir=tmp_path / "one")) == 0
    (tmp_path / "judged-0.txt").unlink()
    (tmp_path / "show.py").write_text(SHOWING_BUCKETS)
    command = [tmp_path / "show.py", ROOT / SCRIPTS["SFT"], *flags(**validating, output_dir=tmp_path / "two")]
    result = torchrun(command, "--nproc_per_node=2")
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (tmp_path / run / "images" / "validation_images_000001.png" for run in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    cost = {f"cost/{name}" for name in ("forwards", "rows_trained", "rows_without_gradient", "images_judged")}
    for name in ("validation/reward", "validation/reward_standard_error", *cost):
        assert metrics(tmp_path / "one")[0][name] == metrics(tmp_path / "two")[0][name]
    drawn = (tmp_path / "prompts.txt").read_text().splitlines()
    judged = [(tmp_path / f"judged-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert judged[0][-3:] == [drawn[0], drawn[1], drawn[4]] and judged[1][-2:] == drawn[2:4]
    gradients, storages = map(int, re.search(r"GRADIENTS (\d+) STORAGES (\d+)", result.stdout).groups())
    assert storages < gradients / 2  # they lie in the buckets, and stay there
    assert result.stdout.count(f"KEPT {gradients}") == 2


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_rank_that_fails_in_validation_stops_both(flags, validating, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "an unlucky prompt"]))
    result = torchrun([ROOT / SCRIPTS["SFT"], *flags(**validating)], "--nproc_per_node=2", timeout=120)
    assert result.returncode == 1
    assert result.stderr.count("error: validation at step 1: the reward") == 1 and "rank 1 fell over" in result.stderr
    assert result.stderr.count("Traceback") == 1  # torchrun's own
    assert (tmp_path / "run" / "checkpoint-1" / "state.json").exists()
    assert len(metrics(tmp_path / "run")) == 1


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_two_machines_equal_two_processes_of_one(flags, validating, tmp_path):
    """Machines that share --output_dir and nothing else: each has a cache of its own."""
    options = {**validating, "learning_rate": 1e-3, "max_train_steps": 2, "gradient_accumulation_steps": 2}
    one = torchrun([ROOT / SCRIPTS["SFT"], *flags(**options, output_dir=tmp_path / "one")], "--nproc_per_node=2")
    assert one.returncode == 0, one.stderr[-3000:]
    for result in two_machines(lambda n: flags(**options, output_dir=tmp_path / "two", cache_dir=tmp_path / f"{n}")):
        assert result.returncode == 0, result.stderr[-3000:]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert same_tensors(tmp_path / "one" / weights, tmp_path / "two" / weights)
    assert [*map(without_speed, metrics(tmp_path / "one"))] == [*map(without_speed, metrics(tmp_path / "two"))]
    assert all((tmp_path / f"{n}" / "diffusion_sharpening").is_dir() for n in range(2))


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_machines_that_see_different_checkpoints_are_refused(flags, trained_once, tmp_path):
    checkpoint = trained_once(max_train_steps=1, checkpointing_steps=1) / "checkpoint-1"
    shutil.copytree(checkpoint, tmp_path / "0" / "checkpoint-1")
    for result in two_machines(lambda n: flags(output_dir=tmp_path / f"{n}", resume_from_checkpoint="latest")):
        assert result.returncode == 1
        assert "does not hold the same checkpoints for every process" in result.stderr


@pytest.mark.parametrize("name", ["DeepSpeed", "FSDP"])
def test_engines_of_accelerates_config_are_refused(name, train, flags, monkeypatch, capsys):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    assert train(flags()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name} is on in accelerate's config") and "accelerate config" in error
    assert ("--fsdp" in error) == (name == "FSDP")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "processes", "words"),
    [
        ({}, "1", ["--fsdp needs several processes", "torchrun", "leave the flag out"]),
        ({"use_lora": True}, "2", ["--fsdp is for full fine-tuning", "--use_lora", "leave one of them out"]),
        ({"use_8bit_adam": True}, "2", ["--use_8bit_adam cannot work", "--fsdp", "leave one of them out"]),
        ({"mixed_precision": "fp16"}, "2", ["--mixed_precision=fp16", "use --mixed_precision=bf16"]),
    ],
    ids=["one process", "LoRA", "8-bit Adam", "fp16"],
)
def test_fsdp_refuses_what_it_cannot_take_apart(
    changes, processes, words, train, flags, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert train(flags(fsdp=True, **changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_result")
def test_accumulation_of_accelerates_config_divides_no_loss(train, flags, monkeypatch, caplog, tmp_path):
    assert train(flags(max_train_steps=1, output_dir=tmp_path / "plain")) == 0
    assert not any("is ignored" in record.message for record in caplog.records)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert train(flags(max_train_steps=1, output_dir=tmp_path / "configured")) == 0
    plain, configured = (metrics(tmp_path / run)[0]["grad_norm"] for run in ("plain", "configured"))
    assert plain == configured
    said = [
        record.message for record in caplog.records if "gradient_accumulation_steps=4 is ignored" in record.message
    ]
    assert len(said) == 1


def test_loss_scale_needs_fp16(train, flags, capsys):
    assert train(flags(initial_loss_scale=1024.0)) == 2
    assert "--initial_loss_scale has no effect without --mixed_precision=fp16" in capsys.readouterr().err


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("method", ["RLHF"])
def test_loss_scale_begins_where_it_is_told_is_logged_and_survives_a_resume(train, flags, monkeypatch, tmp_path):
    """accelerate makes a scaler on a GPU only, so the test puts torch's own for the CPU in its place, with the options
    that accelerate was given; backward, overflow, skipping and saving are the real ones. Gradients are float32, so
    the scale must be near that type's end to overflow."""
    make, precision = launching.make_accelerator, "sharpening.run_flags._check_hardware"

    def with_scaler(*args):
        accelerator = make(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu", **accelerator.scaler_handler.to_kwargs())
        return accelerator

    monkeypatch.setattr(launching, "make_accelerator", with_scaler)
    monkeypatch.setattr(precision, lambda args: None)
    options = {"initial_loss_scale": 2.0**127, "checkpointing_steps": 1}
    assert train(flags(**options)) == 0
    first, second = metrics(tmp_path / "run")
    assert first["scaler/scale"] == 2.0**126 and first["scaler/skipped"] == 1
    assert second["scaler/scale"] == 2.0 ** (126 - second["scaler/skipped"])
    assert train(flags(**options, max_train_steps=3, resume_from_checkpoint="latest")) == 0
    third = metrics(tmp_path / "run")[2]
    assert third["scaler/scale"] == second["scaler/scale"] / 2 ** third["scaler/skipped"] < 2.0**127
