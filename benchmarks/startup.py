"""What passes before the first step: preparing the data, finding it prepared, `--help` and `--dry_run`.

    python benchmarks/startup.py --images 1000

Captioned shapes are prepared for the tiny SDXL as the SFT script prepares them, latents and embeddings, with an empty
cache and then again with that cache. The commands are processes of their own, from launch to exit.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.reporting import describe_machine
from sharpening.errors import exit_status
from sharpening.flags import Flag, parse

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tiny_world" / "sdxl"
SCRIPTS = ("train_sft_diffusion_sharpening_sdxl", "train_rlhf_diffusion_sharpening_sdxl")
FLAGS = (
    Flag("images", "that are prepared", int, 1000, "[1, inf)"),
    Flag("rounds", "launches of each command", int, 5, "[1, inf)"),
)


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
        "pretrained_model_name_or_path": MODEL, "train_data_dir": folder / "shapes", "cache_dir": folder / "cache",
        "output_dir": folder / "run", "resolution": 32, "reward_model": "shapes", "seed": 0, "max_train_steps": 1,
        "report_to": "none", "validation_epochs": 0,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def preparation(folder: Path) -> float:
    """Seconds of reading captioned images and caching what the encoders make of them, as the SFT script does it."""
    import torch

    from sharpening import sdxl
    from sharpening.data.captioned_images import load_captioned_images
    from sharpening.data.encoding_cache import cache_latents_and_embeddings
    from sharpening.model_source import Source

    source = Source("pretrained_model_name_or_path", str(MODEL))
    vae = sdxl.load_decoder(source, "vae", torch.device("cpu"), torch.float32)
    encoders = sdxl.TextEncoders.load(source, torch.device("cpu"), torch.float32)
    columns = {"image_column": "image", "caption_column": "text"}
    cache_dir = str(folder / "cache")
    started = time.perf_counter()
    images = load_captioned_images(
        dataset_name=None, dataset_config_name=None, train_data_dir=str(folder / "shapes"), max_train_samples=None,
        seed=0, cache_dir=cache_dir, **columns,
    )  # fmt: skip
    cache_latents_and_embeddings(
        images, resolution=32, center_crop=False, random_flip=False, seed=0,
        encode_images=lambda pixels: sdxl.encode_images(vae, pixels), encode_prompts=encoders.encode, batch_size=4,
        key={"vae": "tiny", "text": "tiny"}, cache_dir=cache_dir, dtype=torch.float32, **columns,
    )  # fmt: skip
    return time.perf_counter() - started


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit status."""
    args = parse(__doc__.splitlines()[0], {"startup": FLAGS}, argv)
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
