"""A training script as it is, and what it put through the UNet and the decoder, as its own modules saw it.

    python -m study.counted FILE SCRIPT FLAGS...

writes {"forward": rows without a gradient, "train": rows with one, "decode": latents} to FILE when the script has
ended well. Nothing is left out: a frozen reference, the unconditional rows of guidance, validation, all count.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

from sharpening.files import write_aside


def count_rows(counts: Counter[str]) -> None:
    """From now on add up what goes through any UNet, and through any decoder of an autoencoder, of this process."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.autoencoders.vae import Decoder
    from torch.nn.modules.module import register_module_forward_hook

    def count(module: torch.nn.Module, args: tuple, output: object) -> None:
        if isinstance(module, UNet2DConditionModel):
            trains = torch.is_grad_enabled() and output[0].requires_grad
            counts["train" if trains else "forward"] += len(args[0])
        elif isinstance(module, Decoder):
            counts["decode"] += len(args[0])

    register_module_forward_hook(count)


def main(argv: list[str]) -> None:
    """Run a script with its flags as if it had been started by itself."""
    file, script, *flags = argv
    counts: Counter[str] = Counter(forward=0, train=0, decode=0)
    count_rows(counts)
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    with write_aside(Path(file)) as aside:
        aside.write_text(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1:])
