"""The result of a run: the trained pipeline on disk, its model card, and the upload to the hub."""

import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

from sharpening.arguments import public
from sharpening.errors import UserError
from sharpening.sdxl import Source


def save_pipeline(
    args: Namespace,
    source: Source,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    step: int,
    metrics: Mapping[str, float],
) -> None:
    """Write the trained pipeline and its model card into `--output_dir`, where stock diffusers loads it.

    It is written aside first; `model_index.json`, which makes the folder a pipeline, is moved last.
    """
    output_dir = Path(args.output_dir)
    partial = output_dir / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    options = {"unet": unet, "dtype": torch.float32}
    if args.pretrained_vae_model_name_or_path:
        options["vae"] = vae
    pipeline = source.load(StableDiffusionXLPipeline, **options)
    if args.prediction_type is not None:
        # Whoever samples must read the output as what it was trained to be.
        pipeline.scheduler = pipeline.scheduler.from_config(
            pipeline.scheduler.config, prediction_type=args.prediction_type
        )
    pipeline.save_pretrained(partial)
    (partial / "README.md").write_text(model_card(args, step, metrics))
    (output_dir / "model_index.json").unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.rename(target)
    partial.rmdir()


def model_card(args: Namespace, step: int, metrics: Mapping[str, float]) -> str:
    """The README.md of the trained pipeline: hub metadata, the settings and the last metrics of the run."""
    settings = "\n".join(
        f"| `{name}` | `{value}` |" for name, value in sorted(public(args).items()) if value not in (None, False)
    )
    results = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items()))
    base = args.pretrained_model_name_or_path
    name = args.hub_model_id or Path(args.output_dir).name
    # The hub refuses a base_model that is not a repository name.
    base_line = "" if Path(base).exists() else f"base_model: {base}\n"
    return (
        "---\n"
        f"{base_line}library_name: diffusers\npipeline_tag: text-to-image\n"
        "tags: [stable-diffusion-xl, text-to-image, diffusion-sharpening]\n"
        "---\n\n"
        f"# {Path(args.output_dir).name}\n\n"
        f"`{base}` fine-tuned for {step} optimizer steps with Diffusion-Sharpening "
        "([arXiv 2502.12146](https://arxiv.org/abs/2502.12146)), "
        f"reward `{args.reward_model}`, {args.num_noisy_latents} branches of {args.trajectory_nums} steps.\n\n"
        "```python\nfrom diffusers import StableDiffusionXLPipeline\n\n"
        f'pipe = StableDiffusionXLPipeline.from_pretrained("{name}")\n```\n\n'
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
