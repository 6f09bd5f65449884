"""What each means of speed buys by itself: seconds with it as a share of the seconds without, in turns.

    python benchmarks/speedups.py --model mid --resolution 384

The means are those that the scripts use and those that were tried and left. Weights are random; both of a pair do the
same work on the same inputs.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn

from benchmarks.measuring import peak_memory, timed
from benchmarks.models import SIZES, TINY_DECODER, write_pipeline
from benchmarks.reporting import describe_machine, spread
from benchmarks.rivals import random_condition
from sharpening import sdxl
from sharpening.errors import exit_status
from sharpening.flags import Flag, parse

Work = Callable[[], object]

FLAGS = (
    Flag("model", "its size", default="mid", choices=SIZES),
    Flag("resolution", "pixels", int, 512, "[1, inf)"),
    Flag("compile", "also torch.compile, which takes minutes", bool, False),
    Flag("rounds", "pairs that are timed", int, 5, "[1, inf)"),
)


def forwards(unet: UNet2DConditionModel, rows: int, times: int, size: int, dtype: torch.dtype) -> Work:
    """A function that puts `rows` rows through the UNet, `times` times, without gradient."""
    device = unet.device
    x = torch.randn(rows, 4, size, size, device=device)
    condition = random_condition(unet, rows, 8 * size)
    t = torch.full((rows,), 500, device=device)

    @torch.no_grad()
    def work() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for _ in range(times):
                sdxl.predict_output(unet, x, t, condition)

    return work


def decodes(vae: AutoencoderKL | AutoencoderTiny, rows: int, size: int) -> Work:
    """A function that decodes `rows` latents together."""
    latents = torch.randn(rows, 4, size, size, device=vae.device)
    return lambda: sdxl.decode_latents(vae, latents, rows)


def updates(unet: UNet2DConditionModel, **options: object) -> Work:
    """A function that takes an AdamW step on all weights."""
    parameters = [nn.Parameter(parameter.detach().clone()) for parameter in unet.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, **options)
    return optimizer.step


def fused_qkv(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    fused = copy.deepcopy(unet)
    fused.fuse_qkv_projections()
    return fused


def pairs(folder: Path, device: torch.device, size: int, compiled: bool) -> dict[str, tuple[Work, Work]]:
    """What to compare: name -> (without, with)."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval().requires_grad_(False).to(device)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False).to(device)
    small = AutoencoderTiny.from_pretrained(folder / TINY_DECODER).requires_grad_(False).to(device)
    half, single = torch.bfloat16, torch.float32

    def forward(model: nn.Module, rows: int = 3, times: int = 1, dtype: torch.dtype = single) -> Work:
        return forwards(model, rows, times, size, dtype)

    found = {
        "decode, channels last, 1 latent": (
            decodes(vae, 1, size),
            decodes(sdxl.channels_last(copy.deepcopy(vae)), 1, size),
        ),
        "decode, channels last, 3 latents": (
            decodes(vae, 3, size),
            decodes(sdxl.channels_last(copy.deepcopy(vae)), 3, size),
        ),
        "decode in bf16, 1 latent": (decodes(vae, 1, size), decodes(copy.deepcopy(vae).to(half), 1, size)),
        "decode by a small decoder, 3 latents": (decodes(vae, 3, size), decodes(small, 3, size)),
        "forward in bf16, 3 rows": (forward(unet), forward(unet, dtype=half)),
        "forward, channels last, 3 rows": (forward(unet), forward(sdxl.channels_last(copy.deepcopy(unet)))),
        "forward, fused QKV, 3 rows": (forward(unet), forward(fused_qkv(unet))),
        "2 rows in a forward, not 2 forwards": (forward(unet, 1, 2), forward(unet, 2)),
        "AdamW, fused against a loop": (updates(unet, foreach=False), updates(unet, fused=True)),
        "AdamW, foreach against a loop": (updates(unet, foreach=False), updates(unet, foreach=True)),
    }
    if compiled:
        found["forward, torch.compile, 3 rows"] = (forward(unet), forward(torch.compile(unet, dynamic=False)))
    return found


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit status."""
    args = parse(__doc__.splitlines()[0], {"speedups": FLAGS}, argv)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    lines = []
    with tempfile.TemporaryDirectory() as name:
        write_pipeline(args.model, Path(name), torch.float32)
        for what, (without, with_it) in pairs(Path(name), device, args.resolution // 8, args.compile).items():
            first = timed(with_it)  # torch.compile compiles now
            timed(without)
            shares, seconds = [], []
            for _ in range(args.rounds):
                plain = timed(without)
                seconds.append(timed(with_it))
                shares.append(seconds[-1] / plain)
            peaks = []
            for work in (without, with_it):
                with peak_memory() as peak:
                    work()
                peaks.append(f"{peak.size / 2**30:.2f}")
            memory = " and ".join(peaks)
            median = statistics.median(seconds)
            lines.append(
                f"{what:>38}  {median:7.3f} s  {spread(shares)}, peak without and with {memory} GiB"
                + (f", {first:.0f} s to compile" if "compile" in what else "")
            )
    print(f"{describe_machine()}; {' '.join(argv)}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
