"""What another branch and another step cost: seconds and peak memory of the SFT script over n and m.

    python benchmarks/branches.py --model mid --n 1 2 4 --m 1 2 3

Runs the script for every pair, as `benchmarks/step.py` does, and fits a line to the seconds that a step spends on its
branches: walking, decoding and judging. Its slope per branch and step is set against a forward of one row without
gradient, a decode and a reward, measured between the script's steps. A single branch (n = 1) is not judged, so it has
no part in the line.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.reporting import describe_machine
from benchmarks.script import Setting
from benchmarks.step import STEP_FLAGS, measure
from sharpening.errors import exit_status, require
from sharpening.flags import Flag, parse

OF_BRANCHES = ("score", "decode", "reward")
BRANCH_FLAGS = (
    Flag("n", "branches", int, [1, 2, 4], nargs="+"),
    Flag("m", "steps of each branch", int, [1, 2, 3], nargs="+"),
)


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit status."""
    args = parse(__doc__.splitlines()[0], {"script": STEP_FLAGS, "branches": BRANCH_FLAGS}, argv)
    for name, values in (("n", args.n), ("m", args.m)):
        require(min(values) >= 1, f"--{name} has {min(values)}, but it must be at least 1")
    amounts = {n * m for n in args.n for m in args.m if n > 1}
    require(len(amounts) > 1, "--n above 1 and --m give no two amounts of work; name more")
    found, units = {}, []
    for n in args.n:
        for m in args.m:
            of_pair = {"method": "sft", "num_noisy_latents": n, "trajectory_nums": m, "latents_per_prompt": "n"}
            with tempfile.TemporaryDirectory() as folder:
                setting = Setting.of({**vars(args), **of_pair})
                found[n, m] = measure(setting, Path(folder), beside=["branch_step"])
            units += found[n, m]["seconds"]["branch_step"]
    print(f"{describe_machine()}; {' '.join(argv)}")
    print(f"{'n':>3} {'m':>3}  {'branches':>9}  {'train':>8}  {'step':>8}  {'peak':>8}")
    work, spent = [], []
    for (n, m), result in found.items():
        phases = result["phases"]
        of_branches = statistics.median(sum(phase.get(name, 0) for name in OF_BRANCHES) for phase in phases)
        train = statistics.median(phase["train"] for phase in phases)
        whole = statistics.median(result["seconds"]["script"])
        peak = result["peak_bytes"]["script"] / 2**30
        print(f"{n:3} {m:3}  {of_branches:7.3f} s  {train:6.3f} s  {whole:6.3f} s  {peak:4.2f} GiB")
        if n > 1:
            work.append(args.batch * n * m)
            spent.append(of_branches)
    slope, offset = np.polyfit(work, spent, 1)
    unit = statistics.median(units)
    print(f"a branch and step more costs {slope:.3f} s, {slope / unit:.2f}x of a forward, a decode and a reward")
    print(f"({unit:.3f} s); {offset:.3f} s are spent on none")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
