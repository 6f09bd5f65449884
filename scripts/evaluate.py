"""Is the trained model better, by how much, at what cost, and was the reward gamed?

    python scripts/evaluate.py --models base=MODEL tuned=outputs/run lora=outputs/lora --prompts prompts.txt \
        --reward_model clip --metrics image_reward aesthetic --output_dir outputs/evaluation

The first model is the base that the others are compared with. `--reward_model` is what was trained on, `--metrics` are
rewards that were not, which rise too if the images got better and not the reward gamed. A folder that holds a LoRA
adapter is applied to the base; `NAME=PATH@best_of_n:8` samples with a search for `--reward_model` (see
`sharpening/evaluation/search.py`). Prompts are taken in turn until `--num_images` are drawn; image i of every model
starts from the same noise. Images are kept in `--output_dir`: the same command again draws only what is missing.

Writes `summary.json`, `summary.csv`, `scores.csv` (every image), `grid.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from reward import load_reward, parse_reward_spec
from sharpening.arguments import (
    LORA_FILE,
    OneSentenceParser,
    add_reward_flags,
    check_reward_flags,
    looks_local,
    require,
    require_at_least_1,
    reward_flags,
)
from sharpening.errors import exit_status
from sharpening.evaluation.benchmark_export import KINDS, check_export, export, read_geneval_metadata

if TYPE_CHECKING:
    import numpy as np

    from sharpening.rewards.calling import Reward


# What makes a folder a pipeline, or an adapter for the base.
MARKERS = ("model_index.json", LORA_FILE)
SETTINGS = (
    "prompts", "num_images", "num_inference_steps", "guidance_scale", "resolution", "seed", "reward_model", "metrics",
)  # fmt: skip


class Model(NamedTuple):
    """What `--models` says of one model."""

    name: str
    path: str  # of a pipeline or an adapter, or a hub id
    search: str | None


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags, checked before anything is loaded; `models` becomes a list of `Model`.

    Raises:
        UserError: naming the flag and the remedy.
    """
    parser = OneSentenceParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--models",
        required=True,
        nargs="+",
        metavar="NAME=PATH[@SEARCH]",
        help="pipelines or LoRA folders, the base first; a search is best_of_n:N, zero_order:ITERATIONS:NEIGHBOURS, "
        "demon:CANDIDATES, path_integral:CANDIDATES or smc:PARTICLES",
    )
    parser.add_argument(
        "--prompts", required=True, help="a file, or shapes, drawbench, partiprompts, t2i-compbench:SPLIT"
    )
    parser.add_argument(
        "--metrics",
        nargs="*",
        default=[],
        metavar="SPEC",
        help="rewards that were not trained on, such as blip_vqa or clip_non_spatial, those of T2I-CompBench",
    )
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--num_images", type=int, default=400, help="images per model")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--resolution", type=int, help="pixels; unset: the model's own")
    parser.add_argument("--batch_size", type=int, default=4, help="images per forward")
    parser.add_argument(
        "--export", choices=KINDS, help="also lay the images out for a published scorer, and print its commands"
    )
    parser.add_argument("--grid_images", type=int, default=18, help="prompts in the grid")
    parser.add_argument("--seed", type=int, default=1_000_000, help="first seed, apart from those of training")
    parser.add_argument("--cache_dir", help="where models and grades are cached")
    add_reward_flags(parser.add_argument_group("reward"))
    args = parser.parse_args(argv)
    require_at_least_1(args, "num_images", "num_inference_steps", "batch_size", "grid_images")
    require(args.guidance_scale >= 0, f"--guidance_scale is {args.guidance_scale}, but it must not be negative")
    require(args.num_inference_steps <= 1000, f"--num_inference_steps is {args.num_inference_steps}, at most 1000")
    require(
        args.resolution is None or (args.resolution > 0 and args.resolution % 8 == 0),
        f"--resolution is {args.resolution}, but SDXL needs a positive multiple of 8",
    )
    args.models = [parse_model(entry) for entry in args.models]
    names = {model.name for model in args.models}
    require(len(names) == len(args.models), "--models: two models have one name; give each its own")
    base = args.models[0].path
    require(
        not (Path(base) / MARKERS[1]).is_file(),
        f"--models: the base {base} is a LoRA adapter; name the pipeline that it was trained on first",
    )
    check_reward_flags(args)
    for spec in args.metrics:
        parse_reward_spec(spec)
    return args


def parse_model(entry: str) -> Model:
    """`NAME=PATH[@SEARCH]`, checked.

    Raises:
        UserError: naming `--models` and the remedy.
    """
    name, separator, source = entry.partition("=")
    require(bool(name and separator and source), f"--models {entry} must be NAME=PATH")
    require(name.isidentifier(), f"--models {name}=...: the name becomes a folder; use letters, digits and _")
    path, at, search = source.partition("@")
    if at:
        from sharpening.evaluation.search import parse as parse_search

        parse_search(search)
    local = looks_local(path)
    expanded = str(Path(path).expanduser()) if local else path
    require(
        not local or any((Path(expanded) / file).is_file() for file in MARKERS),
        f"--models {path} holds no {' and no '.join(MARKERS)}; give a pipeline folder, a LoRA folder or a hub id",
    )
    return Model(name, expanded, search or None)


def main(argv: list[str]) -> int:
    """Draw, score, print and save; returns the exit status."""
    args = parse_args(argv)
    import torch

    from sharpening.evaluation import comparison as evaluation
    from sharpening.evaluation.prompt_sets import load_prompt_set

    metadata = read_geneval_metadata(Path(args.prompts)) if args.export == "geneval" else []
    column = "prompt" if metadata else "text"
    distinct = load_prompt_set(args.prompts, column, args.cache_dir)
    check_export(args.export, distinct, args.num_images)
    prompts = [distinct[index % len(distinct)] for index in range(args.num_images)]
    device = torch.device(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    specs = list(dict.fromkeys([args.reward_model, *args.metrics]))
    rewards = {spec: load_reward(spec, device, **reward_flags(args)) for spec in specs}

    base = args.models[0].path
    folders, costs = {}, {}
    for name, path, search in args.models:
        drawing = evaluation.Drawing(
            args.num_inference_steps, args.guidance_scale, args.resolution, args.seed, search,
            reward_identity(args) if search else None, str(evaluation.compute_dtype(device)),
        )  # fmt: skip
        folders[name] = evaluation.image_folder(args.output_dir, name, evaluation.identity(path, base), drawing)

        def load(path: str = path) -> evaluation.StableDiffusionXLPipeline:
            return evaluation.load_pipeline(path, base, device, args.cache_dir)

        costs[name] = evaluation.draw_missing(
            load, folders[name], prompts, drawing, args.batch_size, name, rewards[args.reward_model]
        )

    scores = {
        spec: {name: score(rewards[spec], folder, prompts) for name, folder in folders.items()} for spec in specs
    }
    results = {}
    for spec, by_model in scores.items():
        of_base = next(iter(by_model.values()))
        results[spec] = {
            name: evaluation.compare(values, None if values is of_base else of_base)
            for name, values in by_model.items()
        }
    write_files(args, folders, results, scores, costs, prompts)
    first = range(min(args.grid_images, args.num_images))
    shown = {name: evaluation.read_images(folder, prompts, first) for name, folder in folders.items()}
    evaluation.write_grid(shown, prompts[: len(first)], args.output_dir / "grid.png")
    print(
        f"\n{args.num_images} images of {len(distinct)} prompts, guidance {args.guidance_scale:g}, "
        f"{args.num_inference_steps} DDIM steps\n"
    )
    print(evaluation.table(results, args.reward_model))
    for name, cost in costs.items():
        print(f"{name}: {cost.nfe:g} NFE and {cost.seconds:.3g} s per image")
    for name, folder in folders.items() if args.export else []:
        files = [folder / file for file in evaluation.image_names(prompts)]
        commands = export(args.export, files, prompts, args.output_dir / args.export / name, metadata)
        print(f"\n# {name}\n{commands}")
    print(f"written to {args.output_dir}: summary.json, summary.csv, scores.csv, grid.png")
    return 0


def score(reward: Reward, folder: Path, prompts: list[str]) -> np.ndarray:
    """Rewards (N,) of the images in a folder, 64 at a time."""
    import torch

    from sharpening.evaluation.comparison import read_images

    parts = [range(start, min(start + 64, len(prompts))) for start in range(0, len(prompts), 64)]
    scores = [reward.get_reward(read_images(folder, prompts, rows), [prompts[row] for row in rows]) for rows in parts]
    return torch.cat(scores).double().numpy()


def reward_identity(args: argparse.Namespace) -> str:
    """All that shapes the scores of `--reward_model`: what a search found for one reward was not found for another."""
    from sharpening.evaluation.comparison import file_stamp

    unimportant = {"api_key", "cache_dir", "mllm_concurrency", "mllm_timeout", "mllm_max_retries", "mllm_max_calls"}
    flags = {name: value for name, value in sorted(reward_flags(args).items()) if name not in unimportant}
    named = [component.target.rpartition(":")[0] for component in parse_reward_spec(args.reward_model)]
    named += [component.model or "" for component in parse_reward_spec(args.reward_model)]
    return json.dumps([args.reward_model, flags, [file_stamp(Path(name).expanduser()) for name in named if name]])


def write_files(
    args: argparse.Namespace, folders: dict, results: dict, scores: dict, costs: dict, prompts: list[str]
) -> None:
    """`summary.json`, `summary.csv` and `scores.csv`."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    summary = {
        "settings": settings,
        "models": {
            name: {"path": path, "search": search, "images": str(folders[name].resolve()), **costs[name]._asdict()}
            for name, path, search in args.models
        },
        "metrics": {spec: {name: c._asdict() for name, c in models.items()} for spec, models in results.items()},
    }
    (args.output_dir / "summary.json").write_text(json.dumps(without_nan(summary), indent=2))
    rows = [
        {"metric": spec, "model": name, **c._asdict(), **costs[name]._asdict()}
        for spec, models in results.items()
        for name, c in models.items()
    ]
    columns = {f"{name}/{spec}": values for spec, models in scores.items() for name, values in models.items()}
    per_image = [
        {"prompt": prompt, "seed": args.seed + index, **{column: values[index] for column, values in columns.items()}}
        for index, prompt in enumerate(prompts)
    ]
    for file, records in (("summary.csv", rows), ("scores.csv", per_image)):
        with (args.output_dir / file).open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(records[0]))
            writer.writeheader()
            writer.writerows(without_nan(records))


def without_nan(value: object) -> object:
    """The same with None for NaN, which JSON has not."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


if __name__ == "__main__":
    try:
        sys.exit(exit_status(lambda: main(sys.argv[1:])))
    except RuntimeError as error:
        from sharpening.rewards.calling import RewardError

        if not isinstance(error, RewardError):
            raise
        remedy = "mend the reward or add --reward_failure=skip; what was drawn is kept"
        print(f"error: {error}; {remedy}", file=sys.stderr)
        sys.exit(1)
