"""What passes before the first step: preparing the data, finding it prepared, `--help` and `--dry_run`.

    python benchmarks/startup.py --images 1000

The SFT script prepares captioned shapes for the tiny SDXL, latents and embeddings, with an empty cache and then again
with that cache. The commands are processes of their own, from launch to exit.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

from benchmarks.reporting import describe_machine
from sharpening.arguments import OneSentenceParser, require_at_least_1
from sharpening.errors import exit_status

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_sft_diffusion_sharpening_sdxl", "train_rlhf_diffusion_sharpening_sdxl")


def run(command: list[str]) -> float:
    """Seconds of a Python command, run from the root of the project.

    Raises:
        RuntimeError: it failed.
    """
    started = time.perf_counter()
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr[-500:]}")
    return time.perf_counter() - started


def flags(folder: Path) -> list[str]:
    """A run of one step on the shapes in a folder."""
    values = {
        "pretrained_model_name_or_path": ROOT / "tiny_world" / "sdxl", "train_data_dir": folder / "shapes",
        "cache_dir": folder / "cache", "output_dir": folder / "run", "resolution": 32, "reward_model": "shapes",
        "seed": 0, "max_train_steps": 1, "report_to": "none", "validation_epochs": 0,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def preparation(folder: Path) -> float:
    """Seconds that a start of the SFT script spends on reading its data and caching what the encoders make of it."""
    import train_sft_diffusion_sharpening_sdxl as script
    from sharpening.data import captioned_images, encoding_cache

    spent = []

    def timed(function: object) -> object:
        def wrapped(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent.append(time.perf_counter() - started)
            return result

        return wrapped

    with (
        patch.object(captioned_images, "load_captioned_images", timed(captioned_images.load_captioned_images)),
        patch.object(
            encoding_cache,
            "cache_latents_and_embeddings",
            timed(encoding_cache.cache_latents_and_embeddings),
        ),
    ):
        if script.cli(flags(folder)):
            raise RuntimeError("the training script failed; it says above why")
    return sum(spent)


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit status."""
    parser = OneSentenceParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5, help="launches of each command")
    args = parser.parse_args(argv)
    require_at_least_1(args, "images", "rounds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(["tiny_world/make_shapes_dataset.py", f"--output_dir={folder / 'shapes'}", f"--num_images={args.images}"])
        first, second = preparation(folder), preparation(folder)
        launches = {f"{script}.py {flag}": [] for flag in ("--help", "--dry_run") for script in SCRIPTS}
        for _ in range(args.rounds):
            for command, spent in launches.items():
                words = command.split()
                spent.append(run([*words, *flags(folder)] if "--dry_run" in words else words))
    print(describe_machine())
    print(f"{args.images} images prepared in {first:.1f} s, {60 * args.images / first:.0f} a minute")
    print(f"found prepared by a second start in {second:.2f} s")
    for command, spent in launches.items():
        print(f"{command}: {statistics.median(spent):.2f} s ({min(spent):.2f} to {max(spent):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
