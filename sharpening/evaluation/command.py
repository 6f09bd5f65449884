"""What `scripts/evaluate.py` does: draw the images of every model, score them, compare and report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from sharpening.errors import NO_ROOM, UserError, reason
from sharpening.evaluation import blind_study, comparison, drawing, html_report, report
from sharpening.evaluation.benchmark_export import check_export, export, read_geneval_metadata
from sharpening.evaluation.flags import Model, Options
from sharpening.evaluation.prompt_sets import load_prompt_set
from sharpening.files import check_writable
from sharpening.progress import progress
from sharpening.rewards.calling import Reward, RewardError

SETTINGS = (  # written into `summary.json`
    "prompts", "num_images", "num_inference_steps", "guidance_scale", "resolution", "seed", "reward_model", "metrics",
)  # fmt: skip
# Options of a reward that leave its scores as they are.
SHAPE_NO_SCORE = ("api_key", "cache_dir", "mllm_concurrency", "mllm_timeout", "mllm_max_retries", "mllm_max_calls")


def evaluate(options: Options, load_reward: Callable[..., Reward]) -> int:
    """Draw, score, print and save; returns the exit status.

    Args:
        load_reward: `reward.load_reward`.

    Raises:
        UserError: a model, a reward or a set of prompts that cannot be loaded, or a folder that cannot be written.
    """
    try:
        return _evaluate(options, load_reward)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(
            f"--output_dir {options.output_dir} has no room left ({reason(error)}); free space, then give the same "
            "command, which draws only what is missing"
        ) from error


def _evaluate(options: Options, load_reward: Callable[..., Reward]) -> int:
    metadata = read_geneval_metadata(Path(options.prompts)) if options.export == "geneval" else []
    distinct = load_prompt_set(options.prompts, "prompt" if metadata else options.caption_column, options.cache_dir)
    check_export(options.export, distinct, options.num_images)
    check_writable("output_dir", options.output_dir)
    prompts = [distinct[index % len(distinct)] for index in range(options.num_images)]
    device = torch.device(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    specs = dict.fromkeys([options.reward_model, *options.metrics])
    rewards = {spec: load_reward(spec, device, **options.reward_options) for spec in specs}
    try:
        drawn = {
            model.name: draw(model, options, prompts, rewards[options.reward_model], device)
            for model in options.models
        }
        scores = {
            spec: {name: score(reward, folder, prompts) for name, (folder, _) in drawn.items()}
            for spec, reward in rewards.items()
        }
    except RewardError as error:
        remedy = "mend the reward or add --reward_failure=skip; what was drawn is kept"
        print(f"error: {error}; {remedy}", file=sys.stderr)
        return 1
    results = {spec: comparison.compare_with_first(of_models) for spec, of_models in scores.items()}
    images = {name: [folder / file for file in drawing.image_names(prompts)] for name, (folder, _) in drawn.items()}
    write(options, prompts, drawn, scores, results, short_names(rewards), images)

    print(
        f"\n{options.num_images} images of {len(distinct)} prompts, guidance {options.guidance_scale:g}, "
        f"{options.num_inference_steps} DDIM steps\n"
    )
    print(report.table(results, options.reward_model))
    for name, (_, cost) in drawn.items():
        print(f"{name}: {cost.nfe:g} NFE and {cost.seconds:.3g} s per image")
    for name, files in images.items() if options.export else []:
        commands = export(options.export, files, prompts, options.output_dir / options.export / name, metadata)
        print(f"\n# {name}\n{commands}")
    print(f"written to {options.output_dir}: summary.json, summary.csv, scores.csv, grid.png")
    print(f"look at {options.output_dir / 'report.html'}")
    if options.blind:
        key = blind_study.write_study(options.output_dir, prompts, images, options.blind, options.seed)
        print(
            f"give voters {options.output_dir / blind_study.PAGE} and keep {key.name} from them; count what they save:"
        )
        print(f"python scripts/evaluate.py --votes FILE... --output_dir {options.output_dir}")
    return 0


def short_names(rewards: dict[str, Reward]) -> dict[str, str]:
    """What to call each reward, by its spec: one of a file or a module by its own name, unless two would have one."""
    names = {spec: _own_name(spec, reward) for spec, reward in rewards.items()}
    return names if len(set(names.values())) == len(names) else {spec: spec for spec in rewards}


def _own_name(spec: str, reward: Reward) -> str:
    """`redness` of `my_reward.py:redness`; any other spec as it is, with its model and its weight."""
    name = reward.components[0].name
    return name if len(reward.components) == 1 and spec.endswith((f".py:{name}", f".{name}", f":{name}")) else spec


def draw(
    model: Model, options: Options, prompts: Sequence[str], reward: Reward, device: torch.device
) -> tuple[Path, drawing.Cost]:
    """The folder of a model's images, drawn where they are missing, and what one of them cost."""
    base = options.models[0].path
    way = drawing.Drawing(
        options.num_inference_steps,
        options.guidance_scale,
        options.resolution,
        options.seed,
        model.search,
        reward_identity(options, reward) if model.search else None,
        str(drawing.compute_dtype(device)),
    )
    folder = drawing.image_folder(options.output_dir, model.name, drawing.identity(model.path, base), way)

    def load() -> drawing.StableDiffusionXLPipeline:
        return drawing.load_pipeline(model.path, base, device, options.cache_dir)

    return folder, drawing.draw_missing(load, folder, prompts, way, options.batch_size, model.name, reward)


def reward_identity(options: Options, reward: Reward) -> str:
    """All that shapes the scores of `--reward_model`: what a search found for one reward was not found for another."""
    settings = {name: value for name, value in sorted(options.reward_options.items()) if name not in SHAPE_NO_SCORE}
    files = [component.target.rpartition(":")[0] for component in reward.components]
    files += [component.model or "" for component in reward.components]
    stamps = [drawing.file_stamp(Path(file).expanduser()) for file in files if file]
    return json.dumps([options.reward_model, settings, stamps])


def score(reward: Reward, folder: Path, prompts: list[str]) -> np.ndarray:
    """Rewards (N,) float64 of the images in a folder, 64 at a time; NaN where an image has none."""
    parts = [range(start, min(start + 64, len(prompts))) for start in range(0, len(prompts), 64)]
    scores = [
        reward.get_reward(drawing.read_images(folder, prompts, rows), [prompts[row] for row in rows])
        for rows in progress(parts, desc=f"scoring {folder.name}", unit="batch", delay=1)
    ]
    return torch.cat(scores).double().numpy()


def write(
    options: Options,
    prompts: Sequence[str],
    drawn: dict[str, tuple[Path, drawing.Cost]],
    scores: report.Scores,
    results: report.Results,
    labels: dict[str, str],
    images: dict[str, list[Path]],
) -> None:
    """`summary.json`, `summary.csv`, `scores.csv`, `grid.png` and `report.html` in `--output_dir`."""
    models = {}
    for name, path, search in options.models:
        folder, cost = drawn[name]
        models[name] = {"path": path, "search": search, "images": str(folder.resolve()), **cost._asdict()}
    settings = {name: getattr(options, name) for name in SETTINGS} | {"reward_dtype": options.reward_options["dtype"]}
    report.write_files(options.output_dir, settings, models, results, scores, prompts)
    first = range(min(options.grid_images, options.num_images))
    shown = {name: drawing.read_images(folder, prompts, first) for name, (folder, _) in drawn.items()}
    report.write_grid(shown, prompts[: len(first)], options.output_dir / "grid.png")
    html_report.write_html(
        options.output_dir / "report.html", settings, models, results, scores, prompts, images, labels
    )
