"""Does the ranking of table 1 carry over to a less kind world, judged by a network that nobody here trained?

    python -m study.signs                 # everything, into outputs/signs; a section of `docs/study.md` is about it
    python -m study.signs --quick         # the same with a handful of updates and images: does it all run?

The world of `tiny_world/signs.py`, judged by a network that reads (`tiny_world/read_number.py`). Makes the captioned
images, 40% of them wrong, and a tiny SDXL of them; trains it with four methods of table 1 at equal compute, in the
settings that they had in the world of shapes before that table's tuning, of which RLHF's preset had been found by
trials there; judges all on numbers that no method is trained on, by the reward and by a match with templates that no
method sees; and writes `table.md` and `grid.png`. What is done already is not done again; after a change of
`tiny_world/` use a new folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sharpening.files import write_aside
from sharpening.flags import Flag, parse
from sharpening.rewards.ocr import check_installed
from study.cost import ROOT, SFT, compute, decode_cost, updates_within
from study.execution import evaluate, study_folder, train_all
from study.methods import EFFICIENT_RLHF, METHODS, THE_LETTER
from study.plan import Run
from study.report import LEGEND, counted, diversity, gain, markdown, signed
from study.settings import COMMON, WRONG_CAPTIONS
from study.tasks import in_parallel, once, politely
from tiny_world.signs import judged_captions, study_captions

FLAGS = (
    Flag("output_dir", "data, model, runs, evaluations, the table and the grid", Path, ROOT / "outputs" / "signs"),
    Flag("jobs", "processes at a time, of 1.5 GB each", int, os.cpu_count(), "[1, inf)"),
    Flag("quick", "a few updates and images of everything: a rehearsal", bool, False),
)
REWARD, CHECK = "tiny_world/read_number.py:ReadNumber", "study/metrics.py:template_match"
COMPARED = ("standard fine-tuning", "Diffusion-DPO, fixed pairs", THE_LETTER, EFFICIENT_RLHF)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    budget: int = 40_000  # forwards of a row, for each method
    base_data: int = 8000
    vae_steps: int = 1500
    unet_steps: int = 2200
    data: int = 2000
    prompts: int = 64  # at most, trained on and judged
    sets: int = 2  # of kept samples: with 64 prompts about as many as table 1 keeps at this budget
    images: int = 384  # per model
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 24


QUICK = Size(
    budget=200, base_data=60, vae_steps=2, unet_steps=2, data=20, prompts=4, sets=1, images=4, seeds=(0,), batch=4
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """The study of one size, in `output_dir`."""

    size: Size
    output_dir: Path
    decode: float  # what decoding a latent costs, in forwards of a row

    @property
    def base(self) -> Path:
        """The model that all methods train."""
        return self.output_dir / "base" / "model"

    def write_data(self) -> None:
        """The prompts, images with right captions, and those that the base learns from, partly with wrong ones."""
        captions = {"prompts": study_captions(), "judged_prompts": judged_captions()}
        for name, lines in captions.items():
            shuffled = np.random.default_rng(0).permutation(lines)
            text = "\n".join(shuffled[: self.size.prompts]) + "\n"
            with write_aside(self.output_dir / f"{name}.txt") as aside:
                aside.write_text(text, encoding="utf-8")
        folders = {
            "images": ("--num_images", self.size.data, "--captions", "study", "--seed", 1),
            "base_images": (
                "--num_images", self.size.base_data, "--captions", "all", "--wrong_fraction", WRONG_CAPTIONS,
            ),
        }  # fmt: skip
        for name, flags in folders.items():
            folder = self.output_dir / name
            command = ["tiny_world/make_shapes_dataset.py", "--world", "signs", "--output_dir", folder, *flags]
            once(self.output_dir / "data" / name, [command], fresh=[folder])

    def make_base(self) -> float:
        """Train the tiny SDXL; returns the seconds."""
        folder = self.base.parent
        command = ["tiny_world/make_tiny_sdxl.py", "--world", "signs", "--dataset", self.output_dir / "base_images"]
        command += ["--output_dir", self.base, "--grid", folder / "grid.png", "--threads", 1]
        command += ["--vae_steps", self.size.vae_steps, "--unet_steps", self.size.unet_steps]
        command += ["--num_images", min(400, self.size.images)]
        return once(folder, [command], fresh=[folder], inputs=[self.output_dir / "data" / "base_images"])

    def run(self, label: str, seed: int) -> Run:
        """A method at the budget, in its setting from before it was tuned."""
        method = METHODS[label]
        data = ("train_data_dir", "images") if method.script == SFT else ("prompts_file", "prompts.txt")
        flags = {
            **COMMON, **method.untuned().flags, data[0]: self.output_dir / data[1], "resolution": 32,
            "pretrained_model_name_or_path": self.base, "reward_model": REWARD, "train_batch_size": self.size.batch,
            "cache_dir": self.output_dir / "cache", "validation_steps": 0,
        }  # fmt: skip
        if method.keeps:
            flags["sets"] = self.size.sets
        updates = updates_within(self.size.budget, method.script, flags, self.decode)
        flags["lr_warmup_steps"] = max(1, updates // 10)
        spent = compute(method.script, flags, self.decode, updates)
        return Run(method.name, method.script, updates, seed, flags, spent)

    def runs(self) -> dict[str, list[Run]]:
        """Label -> a run per seed."""
        return {label: [self.run(label, seed) for seed in self.size.seeds] for label in COMPARED}

    def judge(self, runs: Sequence[Run], folder: Path) -> float:
        """Judge the base and the models of one seed; returns the seconds."""
        models = {run.key: (self.output_dir / "runs" / run.key / "model", "") for run in runs}
        prompts = self.output_dir / "judged_prompts.txt"
        return evaluate(models, folder, self.size.images, prompts, self.base, REWARD, (CHECK,))

    def table(self, runs: Mapping[str, Sequence[Run]]) -> str:
        """`table.md`."""
        files = {seed: self.output_dir / "evaluation" / f"s{seed}" / "summary.json" for seed in self.size.seeds}
        summaries = {seed: json.loads(file.read_text()) for seed, file in files.items()}
        first = summaries[self.size.seeds[0]]
        base = [f"{first['metrics'][metric]['base']['mean']:.3f}" for metric in (REWARD, CHECK)]
        rows = [["base", "", "", base[0], "", base[1], f"{diversity(Path(first['models']['base']['images'])):.3f}"]]
        compared = {
            label: {
                metric: [summaries[run.seed]["metrics"][metric][run.key] for run in of_label]
                for metric in (REWARD, CHECK)
            }
            for label, of_label in runs.items()
        }
        for label in sorted(compared, key=lambda label: -gain(compared[label][REWARD])[0]):
            of_label = runs[label]
            spent = np.mean(
                [counted(self.output_dir / "runs" / run.key / "model", self.decode)[-1] for run in of_label]
            )
            wins = np.mean([comparison["win_rate"] for comparison in compared[label][REWARD]])
            varied = np.mean([diversity(Path(summaries[r.seed]["models"][r.key]["images"])) for r in of_label])
            rows.append(
                [
                    label, f"{of_label[0].updates}", f"{spent / 1000:.1f}k", signed(compared[label][REWARD]),
                    f"{wins:.2f}", signed(compared[label][CHECK]), f"{varied:.3f}",
                ]
            )  # fmt: skip
        header = ["method", "updates", "forwards", "reward", "win rate", "template match", "diversity"]
        legend = LEGEND.format(seeds=len(self.size.seeds), images=self.size.images)
        prompts = (self.output_dir / "judged_prompts.txt").read_text().splitlines()
        legend += f" The images are of {len(prompts)} prompts: an interval says little about other numbers."
        return f"{legend}\n\n## Signs: {self.size.budget // 1000}k forwards\n\n{markdown(header, rows)}\n"


def main(argv: Sequence[str]) -> int:
    """Make the world's model, train, judge, write; returns the exit status.

    Raises:
        UserError: naming the flag and the remedy.
        Failed: a run or an evaluation did not end well.
    """
    args = parse("Table 1 in the world of signs.", {"study": FLAGS}, argv)
    check_installed(REWARD)
    size, output_dir = QUICK if args.quick else Size(), args.output_dir.expanduser().resolve()
    started = time.perf_counter()
    with study_folder(output_dir, size):
        study = Study(size, output_dir, decode_cost())
        study.write_data()
        seconds = study.make_base()
        print(f"base: {seconds:.0f} s", flush=True)
        runs = study.runs()
        made = [study.base.parent, output_dir / "data" / "images"]
        every = [run for of_label in runs.values() for run in of_label]
        seconds += train_all(every, output_dir / "runs", args.jobs, "train", made)
        by_seed = {
            f"s{seed}": [of_label[index] for of_label in runs.values()] for index, seed in enumerate(size.seeds)
        }
        judging = {
            name: partial(study.judge, members, output_dir / "evaluation" / name) for name, members in by_seed.items()
        }
        seconds += sum(in_parallel(args.jobs, judging, "judge").values())
        table = study.table(runs)
        with write_aside(output_dir / "table.md") as aside:
            aside.write_text(table)
        shutil.copyfile(output_dir / "evaluation" / f"s{size.seeds[0]}" / "grid.png", output_dir / "grid.png")
    print(table)
    took = time.perf_counter() - started
    print(f"{seconds / 3600:.2f} hours of one thread in all; this command took {took:.0f} s")
    print(f"written to {output_dir}: table.md and grid.png")
    return 0


if __name__ == "__main__":
    sys.exit(politely(lambda: main(sys.argv[1:])))
