"""The flags that every training script has, and the checks that no single flag can make of itself.

Nothing here imports torch unless the GPU is asked about, so a typo is answered in well under a second.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharpening.errors import require
from sharpening.files import check_writable, looks_local
from sharpening.flags import Flag, Groups, parse

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

MODEL = (
    Flag("pretrained_model_name_or_path", "SDXL pipeline: hub id or local folder", required=True),
    Flag("pretrained_vae_model_name_or_path", "another VAE, e.g. madebyollin/sdxl-vae-fp16-fix"),
    Flag("revision", "hub revision of the pipeline"),
    Flag("variant", "weight variant of the pipeline, e.g. fp16"),
    Flag(
        "prediction_type",
        "what the UNet predicts; unset: what the model's scheduler config says (SDXL: epsilon)",
        choices=("epsilon", "v_prediction", "sample"),
    ),
)
DATA = (
    Flag("dataset_name", "hub id, dataset folder, parquet file, or webdataset tars (globs allowed)"),
    Flag("dataset_config_name", "configuration of --dataset_name"),
    Flag("train_data_dir", "image folder with a metadata.jsonl"),
    Flag("image_column", "column that holds the image; read where images are trained on", default="image"),
    Flag("caption_column", "column that holds the caption or a list of captions", default="text"),
    Flag("max_train_samples", "train on a random subset of this size", int, range="[1, inf)"),
    Flag("proportion_empty_prompts", "share of prompts dropped", float, 0.0, "[0, 1]"),
    Flag("resolution", "training resolution in pixels, divisible by 8", int, 1024),
    Flag("center_crop", "crop the centre, not a random place; no effect without images", bool, False),
    Flag("random_flip", "mirror half of the images; no effect without images", bool, False),
    Flag("dataloader_num_workers", "worker processes that read the cache", int, 0, "[0, inf)", free=True),
    Flag("cache_dir", "where datasets, models, latents and embeddings are cached", free=True),
)
PRESET = Flag(
    "preset",
    "defaults that follow the paper, or that reproduce the released code; explicit flags win",
    default="paper",
    choices=("paper", "released"),
    free=True,
)
NUM_NOISY_LATENTS = Flag("num_noisy_latents", "n, branches or samples per prompt", int, 3, "[1, inf)")
TRAJECTORY_NUMS = Flag("trajectory_nums", "m, steps along each branch that are trained on", int, 3, "[1, inf)")
INFER_STEPS = Flag("infer_steps", "a step spans num_train_timesteps / infer_steps", int, 25, "[1, inf)")
TRAJECTORY = (
    PRESET,
    NUM_NOISY_LATENTS,
    TRAJECTORY_NUMS,
    INFER_STEPS,
    Flag(
        "branch_guidance_scale",
        "guidance the branch follows; the loss is conditional",
        float,
        range="[0, inf)",
        presets={"paper": 1.0, "released": 1.0},
    ),
    Flag(
        "backprop_through_sampler",
        "keep the graph through the sampler steps, as the released code does; memory grows with m",
        bool,
        presets={"paper": False, "released": True},
    ),
    Flag(
        "branch_target",
        "regress to the branch's own noise (published) or to the noise that leads back to the clean latent",
        default="noise",
        choices=("noise", "consistent"),
    ),
)
NOISING = (
    Flag("snr_gamma", "Min-SNR loss weighting; 5.0 is recommended by its paper", float, range="(0, inf)"),
    Flag("noise_offset", "scale of a constant added to the noise per channel", float, 0.0, "[0, inf)"),
    Flag(
        "timestep_bias_strategy",
        "timesteps to favour: the first or last share of them, or a range",
        default="none",
        choices=("none", "earlier", "later", "range"),
    ),
    Flag("timestep_bias_multiplier", "weight of the favoured timesteps", float, 1.0, "(0, inf)"),
    Flag("timestep_bias_portion", "share favoured by earlier and later", float, 0.25, "(0, 1]"),
    Flag("timestep_bias_begin", "first timestep of range", int, 0),
    Flag("timestep_bias_end", "end (exclusive) of range", int, 1000),
)
PROMPTS = (
    Flag("prompts_file", "txt with a prompt on each line, csv or jsonl; no images are needed"),
    Flag("generation_batch_size", "latents per forward, two rows each with guidance", int, 16, "[1, inf)", free=True),
)
GUIDANCE_SCALE = Flag("guidance_scale", "when generating; 1: without", float, 5.0, "[0, inf)")
BETA_DPO = Flag("beta_dpo", "beta of the preference loss, without DPO's factor 1/2", float, 2500.0, "(0, inf)")
SETS = Flag("sets", "sets of samples of the base per prompt, each drawn once and kept in memory", int, 1, "[1, inf)")
SELECTION = (
    Flag(
        "reward_scaling",
        "what the components of a weighted sum are divided by before selecting: nothing, or each by its running "
        "standard deviation within prompts, so that weights mean importance",
        default="none",
        choices=("none", "spread"),
    ),
)
BATCHES = (
    Flag("reward_vae", "cheaper decoder for scoring, e.g. madebyollin/taesdxl; unset: the VAE"),
    Flag("score_batch_size", "branches per forward when scoring", int, 16, "[1, inf)", free=True),
    Flag("decode_batch_size", "latents per VAE decode", int, 4, "[1, inf)", free=True),
    Flag(
        "train_rows",
        "rows per forward and backward when training; memory grows with it and with nothing else",
        int,
        16,
        "[1, inf)",
        free=True,
    ),
)
OPTIMIZATION = (
    Flag("train_batch_size", "prompts per process, times --gradient_accumulation_steps", int, 16, "[1, inf)"),
    Flag(
        "gradient_accumulation_steps",
        "as many times --train_batch_size prompts make a step; it costs what one batch of all of them costs",
        int,
        1,
        "[1, inf)",
    ),
    Flag("num_train_epochs", "passes over the data, unless --max_train_steps", int, 100, "[1, inf)", free=True),
    Flag("max_train_steps", "optimizer steps; wins over --num_train_epochs", int, range="[1, inf)", free=True),
    Flag("learning_rate", "peak learning rate", float, 1e-4, "(0, inf)"),
    Flag("scale_lr", "multiply it by the rows of an optimizer step", bool, False),
    Flag("lr_scheduler", "its course", default="constant", choices=LR_SCHEDULERS),
    Flag("lr_warmup_steps", "not used by the constant scheduler", int, 500, "[0, inf)"),
    Flag("use_8bit_adam", "AdamW of bitsandbytes with 8-bit states", bool, False),
    Flag("adam_beta1", "", float, 0.9, "[0, 1)"),
    Flag("adam_beta2", "", float, 0.999, "[0, 1)"),
    Flag("adam_weight_decay", "", float, 1e-2, "[0, inf)"),
    Flag("adam_epsilon", "", float, 1e-8, "(0, inf)"),
    Flag("max_grad_norm", "clip the gradient to this norm", float, 1.0, "(0, inf]"),
    Flag("use_ema", "average the weights; validation and the save use them", bool, False),
    Flag("ema_decay", "largest decay of the average", float, 0.9999, "[0, 1)"),
)
LORA_RANK = Flag("lora_rank", "rank of the adapter", int, 16, "[1, inf)")
LORA = (
    Flag("use_lora", "train a low-rank adapter and leave the UNet as it is", bool, False),
    LORA_RANK,
    Flag("lora_alpha", "its scale is alpha / rank; unset: the rank", float, range="(0, inf)"),
)
HARDWARE = (
    Flag("mixed_precision", "unset: what accelerate was configured with", choices=("no", "fp16", "bf16")),
    Flag("gradient_checkpointing", "recompute activations to save memory", bool, False, free=True),
    Flag("allow_tf32", "TF32 matrix products on Ampere and later GPUs", bool, False),
    Flag("enable_xformers_memory_efficient_attention", "needs a CUDA GPU", bool, False),
    Flag("enable_npu_flash_attention", "needs an Ascend NPU with torch_npu", bool, False),
    Flag(
        "initial_loss_scale",
        "first loss scale of fp16, halved at each gradient that overflows; unset: 65536; a resumed run keeps its own",
        float,
        range="(0, inf)",
        free=True,
    ),
    Flag(
        "fsdp",
        "weights, gradients, optimizer, average and reference lie in parts on all processes (FSDP2); full fine-tuning "
        "in bf16 or float32",
        bool,
        False,
        free=True,
    ),
    Flag(
        "collective_timeout_minutes",
        "with several processes: how long one waits for the others, such as while one caches data or saves",
        float,
        180.0,
        "(0, inf)",
        free=True,
    ),
    Flag("local_rank", "set by older launchers; LOCAL_RANK wins", int, -1, free=True),
)
RUN = (
    Flag("output_dir", "checkpoints, curves and the trained pipeline", default="outputs/sharpened", free=True),
    Flag("seed", "of every draw; unset: a random one, which is printed and saved", int, range="[0, 4294967295]"),
    Flag("checkpointing_steps", "optimizer steps between checkpoints", int, 500, "[1, inf)", free=True),
    Flag(
        "checkpoints_total_limit", "keep this many checkpoints, deleting the oldest", int, range="[1, inf)", free=True
    ),
    Flag("resume_from_checkpoint", "continue a run exactly where it was", metavar="latest|PATH", free=True),
    Flag("dry_run", "print the resolved run and exit before loading weights", bool, False, free=True),
)
TRACKING = (
    Flag("report_to", "where curves go", default="wandb", choices=("wandb", "tensorboard", "all", "none"), free=True),
    Flag("logging_dir", "tracker files, inside --output_dir", default="logs", free=True),
    Flag("branch_image_steps", "log best and worst branch every N steps", int, 100, "[1, inf)", free=True),
    Flag("validation_prompt", "prompt drawn during validation", free=True),
    Flag("validation_prompts_file", "or many prompts, one per line", free=True),
    Flag("num_validation_images", "images per prompt", int, 4, "[1, inf)", free=True),
    Flag("validation_steps", "validate every N optimizer steps; 0: never", int, 20, "[0, inf)", free=True),
    Flag("validation_epochs", "validate every N epochs; 0: never", int, 1, "[0, inf)", free=True),
    Flag("validation_guidance_scale", "guidance of validation images", float, 5.0, "[0, inf)", free=True),
    Flag(
        "validation_infer_steps",
        "sampling steps of validation images; unset: --infer_steps",
        int,
        range="[1, inf)",
        free=True,
    ),
)
HUB = (
    Flag("push_to_hub", "upload the trained pipeline with a model card", bool, False, free=True),
    Flag("hub_model_id", "repository to push to; unset: the name of --output_dir", free=True),
    Flag("hub_token", "token to push with; the environment variable HF_TOKEN is safer", secret=True),
)
RUN_FLAGS: Groups = {
    "model": MODEL,
    "data": DATA,
    "batches": BATCHES,
    "optimization": OPTIMIZATION,
    "LoRA": LORA,
    "hardware": HARDWARE,
    "run": RUN,
    "tracking and validation": TRACKING,
    "hub": HUB,
}


def parse_run(description: str, groups: Groups, argv: Sequence[str]) -> argparse.Namespace:
    """The flags of a training script, checked; its groups include `RUN_FLAGS`.

    Raises:
        UserError: naming the flag and the remedy.
    """
    args = parse(description, groups, argv)
    check_run(args)
    for title, check in (("method", check_trajectory), ("noise and timesteps", check_noising)):
        if title in groups:
            check(args)
    return args


def check_run(args: argparse.Namespace) -> None:
    """Every check of the flags of `RUN_FLAGS` that needs no model, no data and no torch, cheapest first.

    Raises:
        UserError: naming the flag and the remedy.
    """
    require(
        args.resolution > 0 and args.resolution % 8 == 0,
        f"--resolution is {args.resolution}, but SDXL needs a positive multiple of 8; "
        f"try {max(8, round(args.resolution / 8) * 8)}",
    )
    require(
        args.use_lora or (args.lora_rank == LORA_RANK.default and args.lora_alpha is None),
        "--lora_rank and --lora_alpha have no effect without --use_lora; add it",
    )
    _check_sources(args)
    _check_output(args)
    _check_launcher()
    _check_hardware(args)


def guided_rows(guidance_scale: float) -> int:
    """Rows of the UNet for each state: 2 with guidance."""
    return 1 if guidance_scale == 1 else 2


def check_trajectory(args: argparse.Namespace) -> None:
    """The check of the flags of `TRAJECTORY`.

    Raises:
        UserError: naming the flag and the remedy.
    """
    require(
        args.trajectory_nums <= args.infer_steps,
        f"--trajectory_nums is {args.trajectory_nums}, but a trajectory has only --infer_steps={args.infer_steps} "
        "steps; lower the first or raise the second",
    )


def check_noising(args: argparse.Namespace) -> None:
    """The checks of the flags of `NOISING`.

    Raises:
        UserError: naming the flag and the remedy.
    """
    require(
        args.timestep_bias_strategy != "range" or 0 <= args.timestep_bias_begin < args.timestep_bias_end,
        f"--timestep_bias_begin={args.timestep_bias_begin} and --timestep_bias_end={args.timestep_bias_end} "
        "enclose no timestep; begin must be at least 0 and below end",
    )
    require(
        args.timestep_bias_strategy == "none" or args.timestep_bias_multiplier != 1,
        f"--timestep_bias_strategy={args.timestep_bias_strategy} has no effect with --timestep_bias_multiplier=1; "
        "set another multiplier",
    )


def check_schedule(flags: Mapping[str, Any], num_train_timesteps: int) -> None:
    """What can only be checked against the model's own scheduler config; flags by name.

    Raises:
        UserError: naming the flag and the remedy.
    """
    for name in ("infer_steps", "validation_infer_steps"):
        require(
            flags[name] is None or flags[name] <= num_train_timesteps,
            f"--{name} is {flags[name]}, but the model has only {num_train_timesteps} timesteps; lower it",
        )
    require(
        flags.get("timestep_bias_strategy") != "range" or flags["timestep_bias_end"] <= num_train_timesteps,
        f"--timestep_bias_end is {flags.get('timestep_bias_end')}, but the model has only {num_train_timesteps} "
        "timesteps; lower it",
    )


def _check_sources(args: argparse.Namespace) -> None:
    named = [f"--{flag}" for flag in ("dataset_name", "train_data_dir", "prompts_file") if getattr(args, flag, None)]
    others = {"train_data_dir": "image folder", "prompts_file": "txt, csv, jsonl"}
    known = [f" or --{flag} ({kind})" for flag, kind in others.items() if hasattr(args, flag)]
    require(
        bool(named),
        f"no training data: give --dataset_name (hub id, folder, parquet, tars){''.join(known)}",
    )
    require(len(named) < 2, f"{' and '.join(named)} name two data sets; give one of them")
    folder = getattr(args, "train_data_dir", None)
    require(
        not folder or Path(folder).is_dir(),
        f"--train_data_dir {folder} is not a folder; give an image folder with a metadata.jsonl",
    )
    for flag, marker in (
        ("pretrained_model_name_or_path", "model_index.json"),
        ("pretrained_vae_model_name_or_path", None),
        ("reward_vae", None),
    ):
        name = getattr(args, flag)
        if name is None or not looks_local(name):
            continue
        path = Path(name).expanduser()
        require(path.is_dir(), f"--{flag} {name} does not exist; give a folder that holds the model, or a hub id")
        require(
            marker is None or (path / marker).is_file(),
            f"--{flag} {name} has no {marker}; give the folder that save_pretrained wrote for a whole pipeline",
        )
    require(
        not (args.validation_prompt and args.validation_prompts_file),
        "--validation_prompt and --validation_prompts_file exclude each other; give one of them",
    )
    if args.validation_prompts_file:
        path = Path(args.validation_prompts_file)
        require(path.is_file(), f"--validation_prompts_file {path} does not exist; give a text file")
        require(bool(path.read_text().split()), f"--validation_prompts_file {path} is empty; give one prompt a line")


def _check_output(args: argparse.Namespace) -> None:
    require(
        args.hub_model_id is None or args.push_to_hub, "--hub_model_id has no effect without --push_to_hub; add it"
    )
    check_writable("output_dir", Path(args.output_dir))
    resume = args.resume_from_checkpoint
    require(
        resume in (None, "latest") or Path(resume).is_dir(),
        f"--resume_from_checkpoint {resume} does not exist; give the path of a checkpoint-N folder, or latest",
    )


def _check_launcher() -> None:
    """Refuse what accelerate would be told by its config to put around the model and the optimizer."""
    for variable, refusal in (
        (
            "ACCELERATE_USE_DEEPSPEED",
            "DeepSpeed is on in accelerate's config, but its engine would step the optimizer at every backward and "
            "this script takes several a step; run `accelerate config` again without it, or launch with torchrun",
        ),
        (
            "ACCELERATE_USE_FSDP",
            "FSDP is on in accelerate's config, but this script takes the model apart itself; run `accelerate config` "
            "again without it, or launch with torchrun, and add --fsdp",
        ),
    ):
        require(not _is_on(variable), refusal)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


def _check_fsdp(args: argparse.Namespace, precision: str | None) -> None:
    require(
        int(os.environ.get("WORLD_SIZE", 1)) > 1,
        "--fsdp needs several processes and there is one; launch with torchrun or `accelerate launch --multi_gpu`, or "
        "leave the flag out",
    )
    require(
        not args.use_lora, "--fsdp is for full fine-tuning and --use_lora trains an adapter; leave one of them out"
    )
    require(
        not args.use_8bit_adam,
        "--use_8bit_adam cannot work on weights that --fsdp keeps in parts; leave one of them out",
    )
    require(
        precision != "fp16",
        "--fsdp does not scale the loss, which --mixed_precision=fp16 needs; use --mixed_precision=bf16",
    )


def _check_hardware(args: argparse.Namespace) -> None:
    if args.enable_npu_flash_attention:
        from importlib.util import find_spec

        require(
            find_spec("torch_npu") is not None,
            "--enable_npu_flash_attention needs an Ascend NPU and the torch_npu package; leave the flag out",
        )
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if args.fsdp:
        _check_fsdp(args, precision)
    require(
        args.initial_loss_scale is None or precision == "fp16",
        "--initial_loss_scale has no effect without --mixed_precision=fp16; leave it out",
    )
    if not (args.enable_xformers_memory_efficient_attention or precision == "fp16"):
        return
    import torch

    gpu = torch.cuda.is_available() and not _is_on("ACCELERATE_USE_CPU")
    require(
        gpu or not args.enable_xformers_memory_efficient_attention,
        "--enable_xformers_memory_efficient_attention needs a CUDA GPU and none is used here; switch it off with "
        "--no-enable_xformers_memory_efficient_attention, PyTorch's own attention is used then",
    )
    require(
        gpu or precision != "fp16", "--mixed_precision=fp16 needs a GPU and none is used here; use bf16 or no on a CPU"
    )
