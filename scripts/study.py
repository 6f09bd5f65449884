"""The paper's comparisons in miniature: tables 1 to 3 and figures 4 to 6 on the tiny world, in one resumable command.

    bash scripts/study.sh                 # everything, into outputs/study; `docs/study.md` is written about it
    bash scripts/study.sh --quick         # the same plan with a handful of updates and images: does it all run?

Trains every method with the two training scripts, judges every model with `scripts/evaluate.py`, and writes
`tables.md`, `results.json` and the figures. What is done already is not done again; every run is one process with one
thread, so that results do not depend on `--jobs`.

Compute is counted in forwards of one row through the UNet: a row that is trained on costs three, a decoded latent what
its floating-point operations cost. Where methods are compared at equal compute, the number of updates follows from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain file from anywhere

from sharpening.arguments import OneSentenceParser, require
from sharpening.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MODEL = "scripts/tiny_sdxl"  # commands run in ROOT, and are recognised after the checkout has moved
SCRIPTS = {"sft": "train_sft_diffusion_sharpening_sdxl", "rlhf": "train_rlhf_diffusion_sharpening_sdxl"}
METRICS = {name: f"scripts/study_metrics.py:{name}" for name in ("colour", "shape", "background", "likeness")}
COMMON = {
    "resolution": 32, "reward_model": "shapes", "train_batch_size": 24, "lr_scheduler": "cosine", "use_ema": True,
    "ema_decay": 0.95, "adam_weight_decay": 0, "score_batch_size": 96, "decode_batch_size": 96, "report_to": "none",
    "validation_guidance_scale": 1, "validation_epochs": 0, "checkpointing_steps": 1_000_000,
}  # fmt: skip
IMAGES = {"center_crop": True, "proportion_empty_prompts": 0.1, "learning_rate": 5e-4}
# The setting of scripts/quickstart_rlhf.sh.
SAMPLES = {
    "reward_on": "sample", "latents_per_prompt": "n", "share_noise_in_pair": True, "num_noisy_latents": 4,
    "trajectory_nums": 1, "infer_steps": 10, "guidance_scale": 1, "beta_dpo": 200, "learning_rate": 1e-4,
    "generation_batch_size": 96,
}  # fmt: skip
# As the paper has it, but without guidance, which all models here are judged without.
LETTER = {
    "num_noisy_latents": 3, "trajectory_nums": 3, "infer_steps": 25, "guidance_scale": 1, "beta_dpo": 2500,
    "learning_rate": 1e-4, "generation_batch_size": 96,
}  # fmt: skip
TRAINING_PROMPTS = 45


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    compute: int = 120_000  # forwards of a row, for each method of table 1
    updates: int = 150  # of SFT where updates are equal
    preference_updates: int = 100  # of RLHF where updates are equal
    images: int = 400  # per trained model
    search_images: int = 180
    data: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = (1e-4, 5e-4, 1e-3)
    sweep: tuple[int, ...] = (1, 2, 3, 4, 8)  # of n and of m
    search: tuple[int, ...] = (2, 4, 8, 16)
    reference_sets: int = 10
    batch: int = 24
    validation_images: int = 36


QUICK = Size(
    compute=800, updates=3, preference_updates=2, images=18, search_images=9, data=60, seeds=(0,),
    learning_rates=(5e-4,), sweep=(1, 2), search=(2,), reference_sets=1, batch=4, validation_images=4,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A training run: `updates` optimizer steps of a script, in `rounds` that each start from the one before."""

    name: str
    script: str
    updates: int
    seed: int
    flags: Mapping[str, object] = field(hash=False)
    compute: float = 0.0  # forwards of a row, over all rounds
    rounds: int = 1

    @property
    def key(self) -> str:
        return f"{self.name}_s{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A flag varied over values, at equal updates: the runs by value and seed."""

    title: str
    flag: str
    runs: Mapping[int, Sequence[Run]]


@dataclass(frozen=True)
class Plan:
    """Every run by where it appears."""

    table_1: Mapping[str, Sequence[Run]]  # label -> a run per seed
    settle: Mapping[tuple[float, str], Sequence[Run]]  # (learning rate, label) -> a run per seed
    sweeps: Sequence[Sweep]
    selection: Mapping[str, Sequence[Run]]  # label -> a run per seed
    searches: Mapping[str, Sequence[str]]  # label -> specs of increasing cost

    def runs(self) -> list[Run]:
        groups = [*self.table_1.values(), *self.settle.values(), *self.selection.values()]
        groups += [runs for sweep in self.sweeps for runs in sweep.runs.values()]
        return list({run.key: run for runs in groups for run in runs}.values())


def decode_cost() -> float:
    """What decoding a latent costs, in forwards of a row through the UNet, by floating-point operations."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    unet = UNet2DConditionModel.from_pretrained(ROOT / MODEL, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(ROOT / MODEL, subfolder="vae")
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
    latent = torch.zeros(1, 4, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        unet(latent, torch.tensor([500]), torch.zeros(1, 77, width), added_cond_kwargs=added)
    with torch.no_grad(), FlopCounterMode(display=False) as decode:
        vae.decode(latent)
    return decode.get_total_flops() / forward.get_total_flops()


def compute_per_update(script: str, flags: Mapping[str, object], decode: float) -> float:
    """Forwards of a row that an optimizer step of the method needs.

    That is less than the script spends where it looks at more than it must: one noise needs no score, regression on
    the best branch no reference and no worst branch, and pairs drawn once are judged once (see `compute_before`).
    """
    module = import_module(SCRIPTS[script])
    args = module.parse_args(words({**flags, "output_dir": "none"}))
    rows = module.rows_per_step(args)
    if args.num_noisy_latents == 1:
        rows |= {"score": 0, "decode": 0}
    if script == "rlhf" and args.train_on == "best":
        rows |= {"score": 0, "reference": 0, "train": rows["train"] / 2}
    if script == "rlhf" and args.generate_with == "reference":
        rows |= {"generate": 0, "decode": 0}
    weights = {"generate": 1, "score": 1, "reference": 1, "train": 3, "decode": decode}
    return sum(weights[name] * count for name, count in rows.items())


def compute_before(flags: Mapping[str, object], decode: float) -> float:
    """Forwards of a row to draw and to judge a frozen reference's latents, once."""
    if flags.get("generate_with") != "reference":
        return 0
    return TRAINING_PROMPTS * flags["reference_sets"] * flags["num_noisy_latents"] * (flags["infer_steps"] + decode)


def words(flags: Mapping[str, object]) -> list[str]:
    """A command line."""
    given = {name: value for name, value in flags.items() if value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def short(rate: float) -> str:
    """A learning rate as part of an identifier: 0.0005 is lr0_0005."""
    return f"lr{rate:g}".replace(".", "_")


def make_plan(size: Size, output_dir: Path, decode: float) -> Plan:
    """All runs of the study."""
    data = {"pretrained_model_name_or_path": MODEL, "cache_dir": output_dir / "cache", "train_batch_size": size.batch}
    data["validation_prompts_file"] = output_dir / "held_out_prompts.txt"
    of_images = {**COMMON, **data, **IMAGES, "train_data_dir": output_dir / "shapes"}
    of_prompts = {**COMMON, **data, "prompts_file": output_dir / "prompts.txt"}

    def run(name: str, script: str, seed: int, updates: int | None = None, rounds: int = 1, **flags: object) -> Run:
        flags = {**(of_images if script == "sft" else of_prompts), **flags}
        each, before = compute_per_update(script, flags, decode), compute_before(flags, decode)
        updates = updates or max(2, int((size.compute / rounds - before) / each))
        flags |= {"lr_warmup_steps": max(1, updates // 10), "num_validation_images": size.validation_images}
        flags["validation_steps"] = max(1, updates // 6) if seed == 0 else 0  # of one seed a curve is shown
        return Run(name, script, updates, seed, flags, rounds * (before + updates * each), rounds)

    def per_seed(name: str, script: str, seeds: Sequence[int] = size.seeds, **flags: object) -> list[Run]:
        return [run(name, script, seed, **flags) for seed in seeds]

    plain = {"num_noisy_latents": 1, "trajectory_nums": 1}
    whole = {"num_noisy_latents": 3, "trajectory_nums": 3}
    fixed = {**SAMPLES, "generate_with": "reference", "reference_sets": size.reference_sets}
    policy = {**SAMPLES, "share_noise_in_pair": False, "train_on": "policy", "trajectory_nums": 4}
    table_1 = {
        "standard fine-tuning": per_seed("table1_fine_tuning", "sft", **plain),
        "best of 4 of the base, fine-tuning": per_seed(
            "table1_best_of_base", "rlhf", **{**fixed, "train_on": "best", "learning_rate": 5e-4}
        ),
        "best of 4 of its own, fine-tuning": per_seed(
            "table1_best_of_own", "rlhf", **{**SAMPLES, "train_on": "best", "learning_rate": 1e-5}
        ),
        "Diffusion-DPO, fixed pairs": per_seed("table1_dpo", "rlhf", **fixed),
        "Diffusion-DPO in 3 rounds (as IterPO)": per_seed(
            "table1_dpo_rounds", "rlhf", **{**fixed, "reference_sets": max(1, size.reference_sets // 3)}, rounds=3
        ),
        "policy gradient (DDPO)": per_seed("table1_ddpo", "rlhf", **policy),
        "SFT sharpening": per_seed("table1_sft", "sft", **whole),
        "RLHF sharpening, the paper's letter": per_seed("table1_rlhf_letter", "rlhf", **LETTER),
        "RLHF sharpening, on samples": per_seed("table1_rlhf", "rlhf", **SAMPLES),
    }
    settle = {}
    for rate in size.learning_rates:
        settings = {"learning_rate": rate}
        sharpened = per_seed(f"sft_{short(rate)}_n3_m3", "sft", updates=size.updates, **whole, **settings)
        equal = round(sharpened[0].compute / compute_per_update("sft", {**of_images, **plain}, decode))
        settle[rate, "SFT sharpening, n = m = 3"] = sharpened
        settle[rate, "fine-tuning, equal updates"] = per_seed(
            f"sft_{short(rate)}_n1_m1", "sft", updates=size.updates, **plain, **settings
        )
        settle[rate, "fine-tuning, equal compute"] = per_seed(
            f"sft_{short(rate)}_n1_m1_long", "sft", updates=equal, **plain, **settings
        )

    def sft(n: int, m: int, seeds: Sequence[int], reward: str = "shapes") -> list[Run]:
        name = f"sft_{short(5e-4)}_n{n}_m{m}" + ("" if reward == "shapes" else "_worst")
        flags = {"num_noisy_latents": n, "trajectory_nums": m, "reward_model": reward}
        return per_seed(name, "sft", seeds, updates=size.updates, **flags)

    def rlhf(n: int, m: int) -> list[Run]:
        flags = {**SAMPLES, "num_noisy_latents": n, "trajectory_nums": m}
        return per_seed(f"rlhf_n{n}_m{m}", "rlhf", size.seeds[:1], updates=size.preference_updates, **flags)

    fixed_n = 3 if 3 in size.sweep else 2
    sweeps = [
        Sweep("SFT, branches n (m = 1)", "n", {n: sft(n, 1, size.seeds) for n in size.sweep}),
        Sweep("RLHF on samples, branches n (m = 1)", "n", {n: rlhf(n, 1) for n in size.sweep if n > 1}),
        Sweep(f"SFT, steps m (n = {fixed_n})", "m", {m: sft(fixed_n, m, size.seeds[:1]) for m in size.sweep}),
        Sweep(f"RLHF on samples, steps m (n = {fixed_n})", "m", {m: rlhf(fixed_n, m) for m in size.sweep}),
    ]
    several = [n for n in size.sweep if n in (3, 8)] or [2]
    selection = {"one noise": sft(1, 1, size.seeds)}
    for n in several:
        selection[f"best of {n} noises"] = sft(n, 1, size.seeds)
        selection[f"worst of {n} noises"] = sft(n, 1, size.seeds, "shapes:-1")
    searches = {
        "best of n": [f"best_of_n:{k}" for k in size.search],
        "zero order": [f"zero_order:{k}:{k + 1}" for k in range(1, len(size.search) + 1)],
        "Demon": [f"demon:{k}" for k in size.search],
        "path integral": [f"path_integral:{k}" for k in size.search],
        "SMC": [f"smc:{k}" for k in size.search],
    }
    return Plan(table_1, settle, sweeps, selection, searches)


class Failed(RuntimeError):
    """A run or an evaluation that did not end well."""


def execute(command: Sequence[str], log: Path) -> None:
    """Run a Python command with one thread, its output into `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as output:
        result = subprocess.run(
            [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
    if result.returncode:
        said = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()]
        raise Failed(f"{said[-1] if said else 'no output'} ({log})")


def once(folder: Path, commands: Sequence[Sequence[str]]) -> float:
    """Run commands whose results lie in `folder`, unless the same ones have ended well; returns their seconds."""
    marker = folder / "finished.json"
    commands = [[str(word) for word in command] for command in commands]
    if marker.is_file():
        finished = json.loads(marker.read_text())
        if finished["commands"] == commands:
            return finished["seconds"]
    marker.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for index, command in enumerate(commands):
        execute(command, folder / f"log{index}.txt")
    seconds = time.perf_counter() - started
    marker.write_text(json.dumps({"commands": commands, "seconds": seconds}))
    return seconds


def train(run: Run, folder: Path) -> float:
    """Train a run into `folder/model`; returns its seconds."""
    commands, start = [], None
    for index in range(run.rounds):
        target = folder / ("model" if index == run.rounds - 1 else f"round{index}")
        flags = {**run.flags, "max_train_steps": run.updates, "seed": 1000 * index + run.seed, "output_dir": target}
        if start is not None:
            flags["pretrained_model_name_or_path"] = start
        commands.append([f"{SCRIPTS[run.script]}.py", *words(flags)])
        start = target
    if not (folder / "finished.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    return once(folder, commands)


def evaluate(models: Mapping[str, str], folder: Path, images: int, metrics: Sequence[str]) -> float:
    """Judge models against the base on the held-out prompts into `folder`; returns the seconds."""
    command = [
        "scripts/evaluate.py",
        "--models",
        f"base={MODEL}",
        *(f"{name}={path}" for name, path in models.items()),
    ]
    command += ["--prompts", "shapes", "--reward_model", "shapes", "--num_images", str(images), "--batch_size", "100"]
    command += ["--guidance_scale", "1", "--grid_images", "9", "--output_dir", str(folder)]
    return once(folder, [command + (["--metrics", *metrics] if metrics else [])])


def in_parallel(jobs: int, tasks: Mapping[str, Callable[[], float]], what: str) -> dict[str, float]:
    """Run tasks, `jobs` at a time; returns their seconds.

    Raises:
        Failed: naming those that did not end well, after the others have.
    """
    seconds, failures = {}, []
    with ThreadPoolExecutor(jobs) as pool:
        names = {pool.submit(task): name for name, task in tasks.items()}
        for count, future in enumerate(as_completed(names), 1):
            name = names[future]
            try:
                seconds[name] = future.result()
                print(f"[{what} {count}/{len(tasks)}] {name}: {seconds[name]:.0f} s", flush=True)
            except Failed as error:
                failures.append(f"{name}: {error}")
                print(f"[{what} {count}/{len(tasks)}] {name} FAILED", flush=True)
    if failures:
        raise Failed("; ".join(failures))
    return seconds


@dataclass(frozen=True)
class Judged:
    """What `evaluate.py` said of the models of the study."""

    folder: Path

    def summary(self, group: str) -> dict:
        return json.loads((self.folder / group / "summary.json").read_text())

    def of(self, group: str, name: str, metric: str = "shapes") -> dict:
        """The comparison of a model with the base; see `evaluation.Comparison`."""
        return self.summary(group)["metrics"][METRICS.get(metric, metric)][name]

    def diversity(self, group: str, name: str) -> float:
        """Standard deviation of a pixel over the images of one prompt, a mean over pixels and prompts, in [0, 1]."""
        from PIL import Image

        files = sorted(Path(self.summary(group)["models"][name]["images"]).glob("*.png"))
        pixels = np.stack([np.asarray(Image.open(file), dtype=np.float32) / 255 for file in files])
        of_prompt = [file.stem.rpartition("-")[2] for file in files]
        groups = [pixels[[p == prompt for p in of_prompt]] for prompt in dict.fromkeys(of_prompt)]
        return float(np.mean([group.std(0).mean() for group in groups]))


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and its standard error, NaN for a single one."""
    count = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else math.nan


def signed(values: Sequence[float]) -> str:
    mean, error = over_seeds(values)
    return f"{mean:+.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def groups_of(plan: Plan, size: Size) -> dict[str, list[Run]]:
    """Which runs are judged together: by what they belong to and by seed."""
    groups: dict[str, list[Run]] = {}
    for seed in size.seeds:
        groups[f"table1_s{seed}"] = [run for runs in plan.table_1.values() for run in runs if run.seed == seed]
        others = {run.key: run for run in plan.runs() if run.seed == seed and not run.name.startswith("table1")}
        for script in SCRIPTS:
            some = [run for run in others.values() if run.script == script]
            for start in range(0, len(some), 6):
                groups[f"{script}_s{seed}_{start // 6}"] = some[start : start + 6]
    return {name: runs for name, runs in groups.items() if runs}


def write_tables(plan: Plan, size: Size, judged: Judged, seconds: Mapping[str, float], path: Path) -> dict:
    """`tables.md`; returns what it says as numbers."""
    where = {run.key: group for group, runs in groups_of(plan, size).items() for run in runs}

    def gains(runs: Sequence[Run], metric: str = "shapes") -> list[float]:
        return [judged.of(where[run.key], run.key, metric)["gain"] for run in runs]

    numbers: dict[str, object] = {}
    first = f"table1_s{size.seeds[0]}"
    base = {metric: judged.of(first, "base", metric)["mean"] for metric in ("shapes", *METRICS)}
    header = ["method", "updates", "compute", "s", "reward", "win rate", *METRICS, "diversity"]
    rows = [["base", "", "", "", f"{base['shapes']:.3f}", "", *(f"{base[name]:.3f}" for name in METRICS)]]
    rows[0].append(f"{judged.diversity(first, 'base'):.3f}")
    for label, runs in plan.table_1.items():
        comparisons = [judged.of(where[run.key], run.key) for run in runs]
        wins = float(np.mean([c["win_rate"] for c in comparisons]))
        diversity = float(np.mean([judged.diversity(where[run.key], run.key) for run in runs]))
        rows.append(
            [label, f"{runs[0].rounds * runs[0].updates}", f"{runs[0].compute / 1000:.0f}k"]
            + [f"{np.mean([seconds[run.key] for run in runs]):.0f}", signed(gains(runs)), f"{wins:.2f}"]
            + [signed(gains(runs, metric)) for metric in METRICS]
            + [f"{diversity:.3f}"]
        )
        numbers[label] = {"gains": gains(runs), "updates": runs[0].updates, "compute": runs[0].compute}
    parts = ["## Table 1: equal compute", markdown(header, rows)]

    rates = list(size.learning_rates)
    labels = list(dict.fromkeys(label for _, label in plan.settle))
    header = ["", "updates", *(f"lr {rate:g}" for rate in rates)]
    rows = [
        [label, f"{plan.settle[rates[0], label][0].updates}"]
        + [signed(gains(plan.settle[rate, label])) for rate in rates]
        for label in labels
    ]
    numbers["settle"] = {f"{label}, lr {rate:g}": gains(runs) for (rate, label), runs in plan.settle.items()}
    parts += ["## SFT sharpening against standard fine-tuning", markdown(header, rows)]

    for sweep in plan.sweeps:
        header = [sweep.flag, *map(str, sweep.runs)]
        rows = [["gain", *(signed(gains(runs)) for runs in sweep.runs.values())]]
        rows.append(["compute", *(f"{runs[0].compute / 1000:.0f}k" for runs in sweep.runs.values())])
        parts += [f"## {sweep.title}", markdown(header, rows)]
        numbers[sweep.title] = {str(value): gains(runs) for value, runs in sweep.runs.items()}

    header = ["trained on", "gain", "loss in the first third of the updates"]
    rows = []
    for label, runs in plan.selection.items():
        early = [np.mean(metric_curve(judged.folder.parent, run, "loss")[: max(1, size.updates // 3)]) for run in runs]
        rows.append([label, signed(gains(runs)), f"{np.mean(early):.3f}"])
        numbers[label] = {"gains": gains(runs), "early_loss": float(np.mean(early))}
    parts += ["## What selection over noises does", markdown(header, rows)]

    header = ["", "NFE", "reward", "gain", "s per image"]
    rows = []
    for group, name, spec in searched(plan):
        summary, comparison = judged.summary(group)["models"][name], judged.of(group, name)
        gain = comparison["gain"]
        label = f"{spec} on RLHF sharpening" if name.endswith("_on_rlhf") else spec
        rows.append(
            [label, f"{summary['nfe']:.0f}", f"{comparison['mean']:.3f}", f"{gain:+.3f}", f"{summary['seconds']:.2f}"]
        )
    parts += ["## Figure 5: search at inference", markdown(header, rows)]
    path.write_text("\n\n".join(parts) + "\n")
    return numbers


def searched(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """(group, model name, spec) of every search."""
    for label, specs in plan.searches.items():
        group = f"search_{specs[0].partition(':')[0]}"
        for spec in specs:
            yield group, spec.replace(":", "_"), spec
        if label == "best of n":
            for spec in specs[:2]:
                yield group, f"{spec.replace(':', '_')}_on_rlhf", spec


def metric_curve(output_dir: Path, run: Run, name: str) -> np.ndarray:
    """A curve of `metrics.jsonl`; steps without a value are left out."""
    lines = (output_dir / "runs" / run.key / "model" / "metrics.jsonl").read_text().splitlines()
    return np.array([line[name] for line in map(json.loads, lines) if name in line])


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    return np.convolve(values, np.ones(window) / window, mode="valid")


def draw_figures(plan: Plan, size: Size, judged: Judged, output_dir: Path) -> None:
    """`figure4.png` to `figure6.png`, and `branches_and_steps.png` for tables 2 and 3."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(figure: pyplot.Figure, name: str) -> None:
        figure.tight_layout()
        figure.savefig(output_dir / name, dpi=130)
        pyplot.close(figure)

    rate = size.learning_rates[len(size.learning_rates) // 2]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2))
    window = max(1, size.updates // 10)
    for index, label in enumerate(dict.fromkeys(label for _, label in plan.settle)):
        run = plan.settle[rate, label][0]
        loss = smooth(metric_curve(output_dir, run, "loss"), window)
        steps = np.arange(window, window + len(loss))
        per_update = run.compute / run.updates
        colour = f"C{index}"
        axes[0].plot(steps, loss, colour, label=label)
        reward = metric_curve(output_dir, run, "validation/reward")
        at = np.arange(1, len(reward) + 1) * max(1, run.updates // 6)
        axes[1].plot(at, reward, f"{colour}o-", markersize=3)
        axes[2].plot(at * per_update / 1000, reward, f"{colour}o-", markersize=3)
    axes[0].set(xlabel="update", ylabel=f"training loss (mean of {window})")
    axes[1].set(xlabel="update", ylabel=f"held-out reward ({size.validation_images} images)")
    axes[2].set(
        xlabel="compute, thousand forwards of a row", ylabel=f"held-out reward ({size.validation_images} images)"
    )
    axes[0].set_xlim(0, 2 * size.updates)
    axes[1].set_xlim(0, 2 * size.updates)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Figure 4 in miniature: SFT sharpening and standard fine-tuning, lr {rate:g}, seed 0")
    save(figure, "figure4.png")

    figure, axis = pyplot.subplots(figsize=(8.5, 5))
    for index, (label, specs) in enumerate(plan.searches.items()):
        names = [
            (group, name)
            for group, name, spec in searched(plan)
            if spec in specs and name.endswith(tuple("0123456789"))
        ]
        points = [(judged.summary(g)["models"][n]["nfe"], judged.of(g, n)) for g, n in names]
        nfe, mean, error = zip(*((x, c["mean"], c["standard_error"]) for x, c in points), strict=True)
        axis.errorbar(nfe, mean, error, fmt="o-", color=f"C{index}", markersize=4, label=f"{label} on the base")
    group = "search_best_of_n"
    nfe = [judged.summary(group)["models"]["base"]["nfe"]]
    names = ["rlhf", *(n for _, n, _ in searched(plan) if n.endswith("_on_rlhf"))]
    points = [(judged.summary(group)["models"][n]["nfe"], judged.of(group, n)) for n in names]
    axis.errorbar(
        nfe, judged.of(group, "base")["mean"], judged.of(group, "base")["standard_error"], fmt="ks", label="base"
    )
    x, mean, error = zip(*((x, c["mean"], c["standard_error"]) for x, c in points), strict=True)
    axis.errorbar(x, mean, error, fmt="r*-", markersize=9, label="RLHF sharpening, then best of n")
    sft = judged.of(group, "sft")
    axis.errorbar(nfe, sft["mean"], sft["standard_error"], fmt="m^", label="SFT sharpening")
    axis.set(xscale="log", xlabel="NFE per image", ylabel="reward on held-out prompts")
    ticks = [25 * 2**power for power in range(6)]
    axis.set_xticks(ticks, map(str, ticks))
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_title("Figure 5 in miniature: reward against the cost of an image")
    save(figure, "figure5.png")

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), sharey=True)
    shown = ("SFT sharpening", "RLHF sharpening, the paper's letter", "RLHF sharpening, on samples")
    for axis, label in zip(axes, shown, strict=True):
        run = plan.table_1[label][0]
        window = max(1, run.updates // 12)
        mean, spread = (smooth(metric_curve(output_dir, run, f"reward/{name}"), window) for name in ("mean", "spread"))
        steps = np.arange(window, window + len(mean))
        axis.plot(steps, mean, label="mean over branches")
        axis.fill_between(steps, mean - spread, mean + spread, alpha=0.2, linewidth=0, label="standard deviation")
        reward = metric_curve(output_dir, run, "validation/reward")
        at = np.arange(1, len(reward) + 1) * max(1, run.updates // 6)
        axis.plot(at, reward, "ko-", markersize=3, label="held-out images")
        axis.set(xlabel="update", title=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("reward")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, "figure6.png")

    where = {run.key: group for group, runs in groups_of(plan, size).items() for run in runs}
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for sweep in plan.sweeps:
        axis = axes[0 if sweep.flag == "n" else 1]
        values = [[judged.of(where[run.key], run.key) for run in runs] for runs in sweep.runs.values()]
        gain = [np.mean([c["gain"] for c in comparisons]) for comparisons in values]
        error = [np.mean([c["gain_standard_error"] for c in comparisons]) for comparisons in values]
        axis.errorbar(list(sweep.runs), gain, error, fmt="o-", markersize=4, label=sweep.title)
        axis.set(xlabel=sweep.flag)
    for axis in axes:
        axis.axhline(0, color="0.7", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("gain over the base")
    figure.suptitle("Tables 2 and 3 in miniature: equal updates; bars are standard errors over images")
    save(figure, "branches_and_steps.png")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The flags.

    Raises:
        UserError: naming the flag and the remedy.
    """
    parser = OneSentenceParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "study")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    parser.add_argument("--quick", action="store_true", help="a few updates and images of everything: a rehearsal")
    args = parser.parse_args(argv)
    require(args.jobs >= 1, f"--jobs is {args.jobs}, but it must be at least 1")
    args.output_dir = args.output_dir.expanduser().resolve()
    return args


def main(argv: Sequence[str]) -> int:
    """Train, judge, write; returns the exit status."""
    args = parse_args(argv)
    size, output_dir = QUICK if args.quick else Size(), args.output_dir
    settings = output_dir / "settings.json"
    described = json.dumps(vars(size), default=list)
    require(
        not settings.is_file() or settings.read_text() == described,
        f"--output_dir {output_dir} holds a study of another size; name another folder",
    )
    started = time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)
    settings.write_text(described)
    dataset = ["scripts/make_shapes_dataset.py", "--output_dir", output_dir / "shapes", "--num_images", size.data]
    dataset += ["--seed", 1, "--training_prompts", output_dir / "prompts.txt"]
    dataset += ["--held_out_prompts", output_dir / "held_out_prompts.txt"]
    if not (output_dir / "data" / "finished.json").is_file():
        shutil.rmtree(output_dir / "shapes", ignore_errors=True)
    once(output_dir / "data", [dataset])
    plan = make_plan(size, output_dir, decode_cost())
    runs = sorted(plan.runs(), key=lambda run: -run.compute)
    print(f"{len(runs)} runs, {sum(run.compute for run in runs) / 1e6:.2f} million forwards of a row", flush=True)
    folder = output_dir / "runs"
    seconds = in_parallel(args.jobs, {run.key: lambda run=run: train(run, folder / run.key) for run in runs}, "train")

    judged = Judged(output_dir / "evaluation")
    tasks = {}
    for group, members in groups_of(plan, size).items():
        models = {run.key: str(folder / run.key / "model") for run in members}
        metrics = list(METRICS.values()) if group.startswith("table1") else []
        tasks[group] = lambda g=group, m=models, x=metrics: evaluate(m, judged.folder / g, size.images, x)
    trained = {
        name: str(folder / plan.table_1[label][0].key / "model")
        for name, label in (("rlhf", "RLHF sharpening, on samples"), ("sft", "SFT sharpening"))
    }
    by_group: dict[str, dict[str, str]] = {"search_best_of_n": dict(trained)}
    for group, name, spec in searched(plan):
        path = trained["rlhf"] if name.endswith("_on_rlhf") else MODEL
        by_group.setdefault(group, {})[name] = f"{path}@{spec}"
    for group, models in by_group.items():
        tasks[group] = lambda g=group, m=models: evaluate(m, judged.folder / g, size.search_images, [])
    spent = in_parallel(args.jobs, tasks, "judge")

    numbers = write_tables(plan, size, judged, seconds, output_dir / "tables.md")
    numbers["process_seconds"] = {"train": sum(seconds.values()), "judge": sum(spent.values())}
    (output_dir / "results.json").write_text(json.dumps(numbers, indent=2))
    draw_figures(plan, size, judged, output_dir)
    print((output_dir / "tables.md").read_text())
    total = sum(seconds.values()) + sum(spent.values())
    print(f"{total / 3600:.2f} hours of one thread in all; this command took {time.perf_counter() - started:.0f} s")
    print(f"written to {output_dir}: tables.md, results.json, figure4.png to figure6.png, branches_and_steps.png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Failed as error:
        print(f"error: {error}; the same command goes on with the rest", file=sys.stderr)
        sys.exit(1)
