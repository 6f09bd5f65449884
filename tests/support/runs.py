"""How tests start the scripts and read what a run leaves."""

import json
import re
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "SFT": "train_sft_diffusion_sharpening_sdxl.py",
    "RLHF": "train_rlhf_diffusion_sharpening_sdxl.py",
    "DPO": "baselines/diffusion_dpo.py",
    "DPO_DATASET": "baselines/diffusion_dpo_dataset.py",
    "BEST_OF_N": "baselines/best_of_n.py",
    "DDPO": "baselines/ddpo.py",
    "D3PO": "baselines/d3po.py",
}

# What depends on the machine's speed, or on what a launch had to do again.
SPEED = {
    "samples_per_second", "peak_memory_gib", "generation_time_share", "cost/forwards", "cost/rows_trained",
    "cost/rows_without_gradient", "cost/images_judged", "cost/seconds", "time/step", "time/generation", "time/score",
    "time/reference", "time/train", "time/validation", "time/other",
}  # fmt: skip


def launcher_words(launcher):
    scripts = Path(sys.executable).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "python": [sys.executable],
        "accelerate": [
            str(scripts / "accelerate"), "launch", "--cpu", "--num_processes=1", "--num_machines=1",
            "--mixed_precision=no", "--dynamo_backend=no",
        ],
        "torchrun": [str(scripts / "torchrun"), "--nproc_per_node=2", f"--master_port={port}"],
    }[launcher]  # fmt: skip


def metrics(run_dir):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def plan_of(text):
    """The lines of a run's plan by name; those that a screen has no room for are broken."""
    return {line[:18].strip(): line[20:] for line in re.sub(r"\n {20}", " ", text).splitlines()}


def without_speed(line):
    """A line of metrics without its `SPEED`."""
    return {name: value for name, value in line.items() if name not in SPEED}


def same_files(left, right, names):
    """The names whose files differ between two folders."""
    return [name for name in names if (Path(left) / name).read_bytes() != (Path(right) / name).read_bytes()]


def same_tensors(left, right):
    """Whether two safetensors files hold the same; their headers are in no fixed order."""
    import torch
    from safetensors.torch import load_file

    left, right = load_file(left), load_file(right)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
