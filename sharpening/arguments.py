"""The flags that both training scripts share, their presets and their validation.

Nothing here imports torch, so a typo is answered in well under a second.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sharpening.errors import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"  # what makes a folder a LoRA adapter, for diffusers too
LORA_LAYERS = ("to_k", "to_q", "to_v", "to_out.0")  # of every attention of the UNet, which `--use_lora` adapts
SECRET_FLAGS = ("api_key", "hub_token")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

# A preset supplies defaults; a flag given on the command line wins over it.
PRESETS = {
    "paper": {"backprop_through_sampler": False, "branch_guidance_scale": 1.0},
    "released": {"backprop_through_sampler": True, "branch_guidance_scale": 1.0},
}


class OneSentenceParser(argparse.ArgumentParser):
    """Raises `UserError` instead of printing 80 flags of usage in front of the actual complaint."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help for every flag")


def shared_parser(description: str) -> argparse.ArgumentParser:
    """The parser with every shared flag. Abbreviations are off: `--api` must not smuggle a key past `SECRET_FLAGS`."""
    parser = OneSentenceParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )

    g = parser.add_argument_group("model")
    g.add_argument("--pretrained_model_name_or_path", required=True, help="SDXL pipeline: hub id or local folder")
    g.add_argument("--pretrained_vae_model_name_or_path", help="another VAE, e.g. madebyollin/sdxl-vae-fp16-fix")
    g.add_argument("--revision", help="hub revision of the pipeline")
    g.add_argument("--variant", help="weight variant of the pipeline, e.g. fp16")
    g.add_argument(
        "--prediction_type",
        choices=["epsilon", "v_prediction", "sample"],
        help="what the UNet predicts; unset: what the model's scheduler config says (SDXL: epsilon)",
    )

    g = parser.add_argument_group("data")
    g.add_argument("--dataset_name", help="hub id, dataset folder, parquet file, or webdataset tars (globs allowed)")
    g.add_argument("--dataset_config_name", help="configuration of --dataset_name")
    g.add_argument("--train_data_dir", help="image folder with a metadata.jsonl")
    g.add_argument("--image_column", default="image", help="column that holds the image; RLHF reads none")
    g.add_argument("--caption_column", default="text", help="column that holds the caption or a list of captions")
    g.add_argument("--max_train_samples", type=int, help="train on a random subset of this size")
    g.add_argument("--proportion_empty_prompts", type=float, default=0, help="share of prompts dropped, in [0, 1]")
    g.add_argument("--resolution", type=int, default=1024, help="training resolution in pixels, divisible by 8")
    g.add_argument("--center_crop", action="store_true", help="crop the centre, not a random place; no effect in RLHF")
    g.add_argument("--random_flip", action="store_true", help="mirror half of the images; no effect in RLHF")
    g.add_argument("--dataloader_num_workers", type=int, default=0, help="worker processes that read the cache")
    g.add_argument("--cache_dir", help="where datasets, models, latents and embeddings are cached")

    g = parser.add_argument_group("method")
    g.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default="paper",
        help="defaults that follow the paper, or that reproduce the released code; explicit flags win",
    )
    g.add_argument("--num_noisy_latents", type=int, default=3, help="n, branches per prompt")
    g.add_argument("--trajectory_nums", type=int, default=3, help="m, steps along each branch")
    g.add_argument("--infer_steps", type=int, default=25, help="a step spans num_train_timesteps / infer_steps")
    g.add_argument("--branch_guidance_scale", type=float, help="guidance the branch follows; the loss is conditional")
    g.add_argument(
        "--backprop_through_sampler",
        action=argparse.BooleanOptionalAction,
        help="keep the graph through the sampler steps, as the released code does; memory grows with m",
    )
    g.add_argument(
        "--branch_target",
        choices=["noise", "consistent"],
        default="noise",
        help="regress to the branch's own noise (published) or to the noise that leads back to the clean latent",
    )
    g.add_argument("--snr_gamma", type=float, help="Min-SNR loss weighting; 5.0 is recommended by its paper")
    g.add_argument("--noise_offset", type=float, default=0, help="scale of a constant added to the noise per channel")
    g.add_argument("--timestep_bias_strategy", choices=["none", "earlier", "later", "range"], default="none")
    g.add_argument("--timestep_bias_multiplier", type=float, default=1.0, help="weight of the favoured timesteps")
    g.add_argument("--timestep_bias_portion", type=float, default=0.25, help="share favoured by earlier and later")
    g.add_argument("--timestep_bias_begin", type=int, default=0, help="first timestep of range")
    g.add_argument("--timestep_bias_end", type=int, default=1000, help="end (exclusive) of range")

    g = parser.add_argument_group("reward")
    add_reward_flags(g)
    g.add_argument("--reward_vae", help="cheaper decoder for scoring, e.g. madebyollin/taesdxl; unset: the VAE")
    g.add_argument("--score_batch_size", type=int, default=8, help="branches per forward when scoring")
    g.add_argument("--decode_batch_size", type=int, default=4, help="latents per VAE decode")

    g = parser.add_argument_group("optimization")
    g.add_argument("--train_batch_size", type=int, default=16, help="prompts per process and micro-batch")
    g.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per optimizer step")
    g.add_argument("--num_train_epochs", type=int, default=100, help="passes over the data, unless --max_train_steps")
    g.add_argument("--max_train_steps", type=int, help="optimizer steps; wins over --num_train_epochs")
    g.add_argument("--learning_rate", type=float, default=1e-4, help="peak learning rate")
    g.add_argument("--scale_lr", action="store_true", help="multiply it by the rows of an optimizer step")
    g.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="constant")
    g.add_argument("--lr_warmup_steps", type=int, default=500, help="not used by the constant scheduler")
    g.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes with 8-bit states")
    g.add_argument("--adam_beta1", type=float, default=0.9)
    g.add_argument("--adam_beta2", type=float, default=0.999)
    g.add_argument("--adam_weight_decay", type=float, default=1e-2)
    g.add_argument("--adam_epsilon", type=float, default=1e-8)
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm")
    g.add_argument("--use_ema", action="store_true", help="average the weights; validation and the save use them")
    g.add_argument("--ema_decay", type=float, default=0.9999, help="largest decay of the average")

    g = parser.add_argument_group("LoRA")
    g.add_argument("--use_lora", action="store_true", help="train a low-rank adapter and leave the UNet as it is")
    g.add_argument("--lora_rank", type=int, default=16, help="rank of the adapter")
    g.add_argument("--lora_alpha", type=float, help="its scale is alpha / rank; unset: the rank")

    g = parser.add_argument_group("hardware")
    g.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], help="unset: what accelerate was configured with"
    )
    g.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations to save memory")
    g.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later GPUs")
    g.add_argument("--enable_xformers_memory_efficient_attention", action="store_true", help="needs a CUDA GPU")
    g.add_argument("--enable_npu_flash_attention", action="store_true", help="needs an Ascend NPU with torch_npu")
    g.add_argument("--local_rank", type=int, default=-1, help="set by older launchers; LOCAL_RANK wins")

    g = parser.add_argument_group("run")
    g.add_argument("--output_dir", default="outputs/sharpened", help="checkpoints, curves and the trained pipeline")
    g.add_argument("--seed", type=int, help="seed of every draw; unset: a random one, which is printed and saved")
    g.add_argument("--checkpointing_steps", type=int, default=500, help="optimizer steps between checkpoints")
    g.add_argument("--checkpoints_total_limit", type=int, help="keep this many checkpoints, deleting the oldest")
    g.add_argument("--resume_from_checkpoint", metavar="latest|PATH", help="continue a run exactly where it was")
    g.add_argument("--dry_run", action="store_true", help="print the resolved run and exit before loading weights")

    g = parser.add_argument_group("tracking and validation")
    g.add_argument("--report_to", choices=["wandb", "tensorboard", "all", "none"], default="wandb")
    g.add_argument("--logging_dir", default="logs", help="tracker files, inside --output_dir")
    g.add_argument("--branch_image_steps", type=int, default=100, help="log best and worst branch every N steps")
    g.add_argument("--validation_prompt", help="prompt drawn during validation")
    g.add_argument("--validation_prompts_file", help="or many prompts, one per line")
    g.add_argument("--num_validation_images", type=int, default=4, help="images per prompt")
    g.add_argument("--validation_steps", type=int, default=20, help="validate every N optimizer steps; 0: never")
    g.add_argument("--validation_epochs", type=int, default=1, help="validate every N epochs; 0: never")
    g.add_argument("--validation_guidance_scale", type=float, default=5.0, help="guidance of validation images")

    g = parser.add_argument_group("hub")
    g.add_argument("--push_to_hub", action="store_true", help="upload the trained pipeline with a model card")
    g.add_argument("--hub_model_id", help="repository to push to; unset: the name of --output_dir")
    g.add_argument("--hub_token", help="token to push with; the environment variable HF_TOKEN is safer")
    return parser


def add_reward_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that choose and configure rewards; `reward_flags` reads them back."""
    group.add_argument(
        "--reward_model",
        default="clip",
        help="a name of reward.py, name:MODEL, a weighted sum such as clip:0.01,image_reward:1, module:Name, or "
        "path/file.py:Name",
    )
    group.add_argument(
        "--reward_failure",
        choices=["raise", "skip"],
        default="raise",
        help="when an image cannot be scored: stop, or leave its branch out of the selection",
    )
    group.add_argument("--clip_model", help="model of the clip reward, e.g. ViT-H-14/laion2b_s32b_b79k; see reward.py")
    group.add_argument("--aesthetic_clip", help="CLIP of the aesthetic reward; unset: ViT-L-14/openai")
    group.add_argument(
        "--compositional_models", metavar="NAME=PATH,...", help="checkpoints of the compositional reward, or one path"
    )
    group.add_argument("--compositional_weights", metavar="W,...", help="their weights, in the same order; unset: 1")
    group.add_argument("--mllm_model", default="gpt-4o", help="model of the mllm reward at its endpoint")
    group.add_argument("--mllm_template", default="five_aspects", help="grading scheme: of mllm_template, or a file")
    group.add_argument(
        "--mllm_score", choices=["overall", "mean"], default="overall", help="overall grade, or mean of the aspects"
    )
    group.add_argument("--mllm_concurrency", type=int, default=8, help="requests under way at once, per process")
    group.add_argument("--mllm_timeout", type=float, default=60.0, help="seconds for one request")
    group.add_argument("--mllm_max_retries", type=int, default=3, help="tries after the first, for one image")
    group.add_argument("--mllm_max_calls", type=int, help="stop after this many requests, retries included")
    group.add_argument("--base_url", help="endpoint of the mllm reward; unset: OPENAI_BASE_URL or OpenAI's own")
    group.add_argument("--api_key", help="key of the mllm reward; the environment variable OPENAI_API_KEY is safer")


def check_reward_flags(args: argparse.Namespace) -> None:
    """Every check of the reward flags that needs no torch.

    Raises:
        UserError: naming the flag and the remedy.
    """
    from mllm_template import load_template
    from reward import parse_compositional, parse_reward_spec

    for name in ("mllm_concurrency", "mllm_max_calls"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name} is {value}, but it must be at least 1")
    require(args.mllm_max_retries >= 0, f"--mllm_max_retries is {args.mllm_max_retries}, but must not be negative")
    require(args.mllm_timeout > 0, f"--mllm_timeout is {args.mllm_timeout}, but it must be above 0")
    for component in parse_reward_spec(args.reward_model):
        if component.target == "mllm":
            load_template(args.mllm_template)
        if component.target == "compositional":
            parse_compositional(component.model or args.compositional_models, args.compositional_weights)


def reward_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as `reward.load_reward` takes them."""
    names = ("clip_", "aesthetic_", "compositional_", "mllm_")
    flags = {name: value for name, value in vars(args).items() if name.startswith(names)}
    return {
        **flags,
        "failure": args.reward_failure,
        "base_url": args.base_url,
        "api_key": args.api_key,
        "cache_dir": args.cache_dir,
    }


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], presets: Mapping[str, Mapping[str, Any]] = PRESETS
) -> argparse.Namespace:
    """Parse, fill in the preset and refuse what cannot work.

    Raises:
        UserError: naming the flag and the remedy.
    """
    args = parser.parse_args(argv)
    for name, value in presets[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    validate(args)
    return args


def validate(args: argparse.Namespace) -> None:
    """Every check that needs no model, no data and no torch, cheapest first.

    Raises:
        UserError: naming the flag and the remedy.
    """
    require_at_least_1(
        args, "num_noisy_latents", "trajectory_nums", "infer_steps", "train_batch_size", "gradient_accumulation_steps",
        "num_train_epochs", "score_batch_size", "decode_batch_size", "checkpointing_steps", "num_validation_images",
        "branch_image_steps", "lora_rank",
    )  # fmt: skip
    for name in ("max_train_samples", "max_train_steps", "checkpoints_total_limit"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name} is {value}, but it must be at least 1, or left out")
    for name in (
        "validation_steps", "validation_epochs", "lr_warmup_steps", "dataloader_num_workers", "noise_offset",
        "adam_weight_decay", "branch_guidance_scale", "validation_guidance_scale",
    ):  # fmt: skip
        require(getattr(args, name) >= 0, f"--{name} is {getattr(args, name)}, but it must not be negative")
    for name in ("learning_rate", "adam_epsilon", "max_grad_norm", "timestep_bias_multiplier"):
        require(getattr(args, name) > 0, f"--{name} is {getattr(args, name)}, but it must be above 0")
    for name in ("adam_beta1", "adam_beta2", "ema_decay"):
        require(0 <= getattr(args, name) < 1, f"--{name} is {getattr(args, name)}, but it must lie in [0, 1)")
    require(
        0 <= args.proportion_empty_prompts <= 1,
        f"--proportion_empty_prompts is {args.proportion_empty_prompts}, but it is a share and must lie in [0, 1]",
    )
    require(
        args.resolution > 0 and args.resolution % 8 == 0,
        f"--resolution is {args.resolution}, but SDXL needs a positive multiple of 8; "
        f"try {max(8, round(args.resolution / 8) * 8)}",
    )
    require(
        args.trajectory_nums <= args.infer_steps,
        f"--trajectory_nums is {args.trajectory_nums}, but a trajectory has only --infer_steps={args.infer_steps} "
        "steps; lower the first or raise the second",
    )
    require(args.seed is None or 0 <= args.seed < 2**32, f"--seed is {args.seed}, but it must lie in [0, 4294967295]")
    require(args.lora_alpha is None or args.lora_alpha > 0, f"--lora_alpha is {args.lora_alpha}, but must be above 0")
    require(
        args.use_lora or (args.lora_rank == 16 and args.lora_alpha is None),
        "--lora_rank and --lora_alpha have no effect without --use_lora; add it",
    )
    require(args.snr_gamma is None or args.snr_gamma > 0, f"--snr_gamma is {args.snr_gamma}, but must be above 0")
    require(
        0 < args.timestep_bias_portion <= 1,
        f"--timestep_bias_portion is {args.timestep_bias_portion}, but it must lie in (0, 1]",
    )
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
    _validate_sources(args)
    _validate_output(args)
    _validate_hardware(args)


def validate_schedule(args: argparse.Namespace, num_train_timesteps: int) -> None:
    """What can only be checked against the model's own scheduler config.

    Raises:
        UserError: naming the flag and the remedy.
    """
    require(
        args.infer_steps <= num_train_timesteps,
        f"--infer_steps is {args.infer_steps}, but the model has only {num_train_timesteps} timesteps; lower it",
    )
    require(
        args.timestep_bias_strategy != "range" or args.timestep_bias_end <= num_train_timesteps,
        f"--timestep_bias_end is {args.timestep_bias_end}, but the model has only {num_train_timesteps} timesteps; "
        "lower it",
    )


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_at_least_1(args: argparse.Namespace, *names: str) -> None:
    """Raise a `UserError` that names the first of these flags whose number is below 1."""
    for name in names:
        value = getattr(args, name)
        require(value >= 1, f"--{name} is {value}, but it must be at least 1")


def looks_local(name: str) -> bool:
    """Whether a model or dataset name can only be a path: hub ids are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _validate_sources(args: argparse.Namespace) -> None:
    named = [f"--{flag}" for flag in ("dataset_name", "train_data_dir", "prompts_file") if getattr(args, flag, None)]
    prompts_file = " or --prompts_file (txt, csv, jsonl)" if hasattr(args, "prompts_file") else ""
    require(
        bool(named),
        "no training data: give --dataset_name (hub id, folder, parquet, tars) or --train_data_dir (image folder)"
        f"{prompts_file}",
    )
    require(len(named) < 2, f"{' and '.join(named)} name two data sets; give one of them")
    require(
        not args.train_data_dir or Path(args.train_data_dir).is_dir(),
        f"--train_data_dir {args.train_data_dir} is not a folder; give an image folder with a metadata.jsonl",
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
    check_reward_flags(args)


def _validate_output(args: argparse.Namespace) -> None:
    require(
        args.hub_model_id is None or args.push_to_hub, "--hub_model_id has no effect without --push_to_hub; add it"
    )
    output = Path(args.output_dir)
    existing = output
    while not existing.exists():
        existing = existing.parent
    require(
        existing.is_dir() and os.access(existing, os.W_OK),
        f"--output_dir {output} cannot be written, because {existing} is not a writable folder; choose another",
    )
    resume = args.resume_from_checkpoint
    require(
        resume in (None, "latest") or Path(resume).is_dir(),
        f"--resume_from_checkpoint {resume} does not exist; give the path of a checkpoint-N folder, or latest",
    )


def _validate_hardware(args: argparse.Namespace) -> None:
    if args.enable_npu_flash_attention:
        from importlib.util import find_spec

        require(
            find_spec("torch_npu") is not None,
            "--enable_npu_flash_attention needs an Ascend NPU and the torch_npu package; leave the flag out",
        )
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if not (args.enable_xformers_memory_efficient_attention or precision == "fp16"):
        return
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true")
    require(
        gpu or not args.enable_xformers_memory_efficient_attention,
        "--enable_xformers_memory_efficient_attention needs a CUDA GPU and none is used here; leave the flag out, "
        "PyTorch's own attention is used then",
    )
    require(
        gpu or precision != "fp16", "--mixed_precision=fp16 needs a GPU and none is used here; use bf16 or no on a CPU"
    )


def public(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments without secrets, for trackers, logs and saved files."""
    return {name: value for name, value in vars(args).items() if name not in SECRET_FLAGS}


def redact(argv: Sequence[str]) -> list[str]:
    """A command line whose secret values are replaced, in both spellings `--api_key X` and `--api_key=X`.

    Trackers record `sys.argv` on their own: W&B writes it to `wandb-metadata.json`.
    """
    redacted, hide_next = [], False
    for argument in argv:
        flag, separator, _ = argument.partition("=")
        secret = flag.lstrip("-") in SECRET_FLAGS
        redacted.append("***" if hide_next else f"{flag}=***" if secret and separator else argument)
        hide_next = secret and not separator
    return redacted
