"""The runs of the study (`study/execution.py`): every training run of the paper's comparisons, and what it may cost.

Compute is counted in forwards of one row through the UNet: a row that is trained on costs three, a decoded latent what
its floating-point operations cost. Where methods are compared at equal compute, the number of updates follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = "tiny_world/sdxl"
SCRIPTS = {"sft": "train_sft_diffusion_sharpening_sdxl", "rlhf": "train_rlhf_diffusion_sharpening_sdxl"}
METRICS = {name: f"study/metrics.py:{name}" for name in ("colour", "shape", "background", "likeness")}
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
ON_IMAGES, ON_SAMPLES = "SFT sharpening", "RLHF sharpening, on samples"
THE_LETTER = "RLHF sharpening, the paper's letter"
FROM_UPDATES = ("lr_warmup_steps", "num_validation_images", "validation_steps")  # set by the number of updates
TRAINING_PROMPTS = 45
WRONG_CAPTIONS = 0.4  # the share that the base model was trained on
DATA = {"shapes": "right captions", "shapes_wrong": f"{WRONG_CAPTIONS:.0%} wrong captions"}  # folder -> what it holds


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
    selection: Mapping[tuple[str, str], Sequence[Run]]  # (label, data) -> a run per seed
    rates: Mapping[str, Sequence[Run]]  # label of table 1 -> a run at a third and at three times its learning rate
    searches: Mapping[str, Sequence[str]]  # label -> specs of increasing cost

    def runs(self) -> list[Run]:
        groups = [*self.table_1.values(), *self.settle.values(), *self.selection.values(), *self.rates.values()]
        groups += [runs for sweep in self.sweeps for runs in sweep.runs.values()]
        return list({run.key: run for runs in groups for run in runs}.values())

    def groups(self) -> dict[str, list[Run]]:
        """Which runs are judged together: at most 7 of one seed, those of table 1 by themselves."""
        runs = self.runs()
        first = {run.key for rows in self.table_1.values() for run in rows}
        groups: dict[str, list[Run]] = {}
        for seed in dict.fromkeys(run.seed for run in runs):
            groups[f"table1_s{seed}"] = [run for run in runs if run.seed == seed and run.key in first]
            others = [run for run in runs if run.seed == seed and run.key not in first]
            for start in range(0, len(others), 7):
                groups[f"others_s{seed}_{start // 7}"] = others[start : start + 7]
        return groups

    def search_specs(self) -> list[tuple[str, str, str, bool]]:
        """(group, model name, spec, whether the RLHF model is searched) of every search at inference."""
        found = []
        for label, specs in self.searches.items():
            group = f"search_{specs[0].partition(':')[0]}"
            found += [(group, spec.replace(":", "_"), spec, False) for spec in specs]
            if label == "best of n":
                found += [(group, f"{spec.replace(':', '_')}_on_rlhf", spec, True) for spec in specs[:2]]
        return found


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

    That is less than the script spends where it looks at more than it must: one noise needs no score; a pair that was
    judged by its samples none before its one gradient step; regression on the best branch no reference; and pairs
    drawn once are judged once (see `compute_before`).
    """
    module = import_module(SCRIPTS[script])
    args = module.parse_args(words({**flags, "output_dir": "none"}))
    rows = module.rows_per_step(args)
    if args.num_noisy_latents == 1:
        rows |= {"score": 0, "decode": 0}
    if script == "rlhf" and args.reward_on == "sample" and args.trajectory_nums == 1:
        rows |= {"score": 0}
    if script == "rlhf" and args.train_on == "best":
        rows |= {"reference": 0}
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
    rate_of_images = short(IMAGES["learning_rate"])
    of_figure_4 = {f"sft_{rate_of_images}_{which}" for which in ("n3_m3", "n1_m1", "n1_m1_long")}  # shown over time

    def run(name: str, script: str, seed: int, updates: int | None = None, rounds: int = 1, **flags: object) -> Run:
        flags = {**(of_images if script == "sft" else of_prompts), **flags}
        each, before = compute_per_update(script, flags, decode), compute_before(flags, decode)
        updates = updates or max(2, int((size.compute / rounds - before) / each))
        flags |= {"lr_warmup_steps": max(1, updates // 10), "num_validation_images": size.validation_images}
        flags["validation_steps"] = max(1, updates // 6) if seed == 0 and name in of_figure_4 else 0
        return Run(name, script, updates, seed, flags, rounds * (before + updates * each), rounds)

    def per_seed(name: str, script: str, seeds: Sequence[int] = size.seeds, **flags: object) -> list[Run]:
        return [run(name, script, seed, **flags) for seed in seeds]

    plain = {"num_noisy_latents": 1, "trajectory_nums": 1}
    whole = {"num_noisy_latents": 3, "trajectory_nums": 3}
    of_base = {**SAMPLES, "generate_with": "reference", "reference_sets": size.reference_sets}
    dpo = {**of_base, "reward_margin_scale": 0}  # Diffusion-DPO knows no margin
    policy = {**SAMPLES, "share_noise_in_pair": False, "train_on": "policy", "trajectory_nums": 4}
    table_1 = {
        "standard fine-tuning": per_seed("table1_fine_tuning", "sft", **plain),
        "best of 4 of the base, fine-tuning": per_seed(
            "table1_best_of_base", "rlhf", **{**of_base, "train_on": "best", "learning_rate": 5e-4}
        ),
        "best of 4 of its own, fine-tuning": per_seed(
            "table1_best_of_own", "rlhf", **{**SAMPLES, "train_on": "best", "learning_rate": 1e-5}
        ),
        "Diffusion-DPO, fixed pairs": per_seed("table1_dpo", "rlhf", **dpo),
        "Diffusion-DPO in 3 rounds (as IterPO)": per_seed(
            "table1_dpo_rounds", "rlhf", **{**dpo, "reference_sets": max(1, size.reference_sets // 3)}, rounds=3
        ),
        "policy gradient (DDPO)": per_seed("table1_ddpo", "rlhf", **policy),
        ON_IMAGES: per_seed("table1_sft", "sft", **whole),
        THE_LETTER: per_seed("table1_rlhf_letter", "rlhf", **LETTER),
        ON_SAMPLES: per_seed("table1_rlhf", "rlhf", **SAMPLES),
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

    def sft(n: int, m: int, seeds: Sequence[int], reward: str = "shapes", data: str = "shapes") -> list[Run]:
        name = f"sft_{rate_of_images}_n{n}_m{m}" + ("" if reward == "shapes" else "_worst")
        name += "" if data == "shapes" else f"_{data}"
        flags = {"num_noisy_latents": n, "trajectory_nums": m, "reward_model": reward}
        return per_seed(name, "sft", seeds, updates=size.updates, train_data_dir=output_dir / data, **flags)

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
    selection = {}
    for data in DATA:
        selection["one noise", data] = sft(1, 1, size.seeds, data=data)
        for n in several:
            selection[f"best of {n} noises", data] = sft(n, 1, size.seeds, data=data)
            # A negative weight turns the reward round.
            selection[f"worst of {n} noises", data] = sft(n, 1, size.seeds, "shapes:-1", data=data)
    rates = {}
    for label, (first, *_) in table_1.items():
        if first.script == "rlhf":  # the settings on given images have a comparison of their own
            flags = {name: value for name, value in first.flags.items() if name not in FROM_UPDATES}
            rate = flags.pop("learning_rate")
            rates[label] = [
                run(f"{word}_{first.name}", "rlhf", first.seed, rounds=first.rounds, learning_rate=changed, **flags)
                for word, changed in (("low", rate / 3), ("high", rate * 3))
            ]
    searches = {
        "best of n": [f"best_of_n:{k}" for k in size.search],
        "zero order": [f"zero_order:{k}:{k + 1}" for k in range(1, len(size.search) + 1)],
        "Demon": [f"demon:{k}" for k in size.search],
        "path integral": [f"path_integral:{k}" for k in size.search],
        "SMC": [f"smc:{k}" for k in size.search],
    }
    return Plan(table_1, settle, sweeps, selection, rates, searches)
