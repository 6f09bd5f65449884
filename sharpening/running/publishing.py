"""The result of a run: the trained pipeline on disk, its model card, and the upload to the hub."""

import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

from sharpening.arguments import LORA_FILE, public
from sharpening.errors import UserError
from sharpening.sdxl import Source, save_lora


def save_result(
    args: Namespace,
    source: Source,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    step: int,
    metrics: Mapping[str, float],
) -> str:
    """Write what was trained and its model card into `--output_dir`, where stock diffusers loads it; says what it is.

    That is a whole pipeline or, with `--use_lora`, the adapter. It is written aside first; the file that makes the
    folder what it is, `model_index.json` or the adapter's weights, is moved last.
    """
    output_dir = Path(args.output_dir)
    partial = output_dir / ".result.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if args.use_lora:
        save_lora(unet, partial)
    else:
        _save_pipeline(args, source, unet, vae, partial)
    (partial / "README.md").write_text(model_card(args, step, metrics))
    markers = ("model_index.json", LORA_FILE)
    for marker in markers:
        (output_dir / marker).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name in markers):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)
    partial.rmdir()
    return "LoRA adapter" if args.use_lora else "pipeline"


def _save_pipeline(
    args: Namespace, source: Source, unet: UNet2DConditionModel, vae: AutoencoderKL, folder: Path
) -> None:
    options = {"unet": unet, "dtype": torch.float32}
    if args.pretrained_vae_model_name_or_path:
        options["vae"] = vae
    pipeline = source.load(StableDiffusionXLPipeline, **options)
    if args.prediction_type is not None:
        # Whoever samples must read the output as what it was trained to be.
        pipeline.scheduler = pipeline.scheduler.from_config(
            pipeline.scheduler.config, prediction_type=args.prediction_type
        )
    pipeline.save_pretrained(folder)


def model_card(args: Namespace, step: int, metrics: Mapping[str, float]) -> str:
    """The README.md of the result: hub metadata, how to load it, the settings and the last metrics of the run."""
    settings = "\n".join(
        f"| `{name}` | `{value}` |" for name, value in sorted(public(args).items()) if value not in (None, False)
    )
    results = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items()))
    base = args.pretrained_model_name_or_path
    name = args.hub_model_id or Path(args.output_dir).name
    # The hub refuses a base_model that is not a repository name.
    base_line = "" if Path(base).exists() else f"base_model: {base}\n"
    load = f'pipe = StableDiffusionXLPipeline.from_pretrained("{base if args.use_lora else name}")\n'
    if args.use_lora:
        load += f'pipe.load_lora_weights("{name}")\n'
        if args.prediction_type is not None:
            changed = f'pipe.scheduler.config, prediction_type="{args.prediction_type}"'
            load += f"pipe.scheduler = pipe.scheduler.from_config({changed})\n"
    return (
        "---\n"
        f"{base_line}library_name: diffusers\npipeline_tag: text-to-image\n"
        f"tags: [stable-diffusion-xl, text-to-image, diffusion-sharpening{', lora' * args.use_lora}]\n"
        "---\n\n"
        f"# {Path(args.output_dir).name}\n\n"
        f"`{base}` fine-tuned for {step} optimizer steps with {args.method} Diffusion-Sharpening "
        "([arXiv 2502.12146](https://arxiv.org/abs/2502.12146)), "
        f"reward `{args.reward_model}`, {args.num_noisy_latents} branches of {args.trajectory_nums} steps.\n\n"
        "```python\nfrom diffusers import StableDiffusionXLPipeline\n\n"
        f"{load}```\n\n"
        f"## Last metrics\n\n| metric | value |\n| --- | --- |\n{results}\n\n"
        f"## Settings\n\n| flag | value |\n| --- | --- |\n{settings}\n"
    )


def push_to_hub(args: Namespace) -> None:
    """Upload the trained pipeline and its model card, without checkpoints, logs and images.

    Raises:
        UserError: the hub refused; the pipeline on disk is complete.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=args.hub_token)
    try:
        repository = api.create_repo(args.hub_model_id or Path(args.output_dir).name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=args.output_dir,
            ignore_patterns=["checkpoint-*", ".checkpoint-*", f"{args.logging_dir}/*", "images/*", "metrics.jsonl"],
        )
    except Exception as error:
        raise UserError(
            f"--push_to_hub failed ({type(error).__name__}); the pipeline is complete in {args.output_dir}, check "
            "--hub_token and --hub_model_id and upload it with `hf upload`"
        ) from error
