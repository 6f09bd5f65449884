"""The flags of `scripts/evaluate.py`, checked. Nothing here imports torch unless a model is searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sharpening.errors import UserError, require
from sharpening.evaluation.benchmark_export import KINDS
from sharpening.files import LORA_FILE, MODEL_MARKERS, looks_local
from sharpening.flags import Flag, parse

FLAGS = (
    Flag(
        "models",
        "pipelines or LoRA folders, the base first; a search is best_of_n:N, zero_order:ITERATIONS:NEIGHBOURS, "
        "demon:CANDIDATES, path_integral:CANDIDATES or smc:PARTICLES",
        required=True,
        nargs="+",
        metavar="NAME=PATH[@SEARCH]",
    ),
    Flag("prompts", "a file, or shapes, drawbench, partiprompts, t2i-compbench:SPLIT", required=True),
    Flag("caption_column", "of the prompts in a csv or jsonl file", default="text"),
    Flag(
        "metrics",
        "rewards that were not trained on, such as blip_vqa, t2i_spatial, clip_non_spatial and t2i_complex, those of "
        "T2I-CompBench",
        nargs="*",
        metavar="SPEC",
    ),
    Flag("output_dir", "images and results", Path, required=True),
    Flag("num_images", "images per model", int, 400, "[1, inf)"),
    Flag("num_inference_steps", "DDIM steps", int, 25, "[1, 1000]"),
    Flag("guidance_scale", "classifier-free guidance; none up to 1", float, 5.0, "[0, inf)"),
    Flag("resolution", "pixels, divisible by 8; unset: the model's own", int, range="[8, inf)"),
    Flag("batch_size", "images per forward", int, 4, "[1, inf)"),
    Flag("export", "also lay the images out for a published scorer, and print its commands", choices=KINDS),
    Flag("grid_images", "prompts in the grid", int, 18, "[1, inf)"),
    Flag("seed", "first seed, apart from those of training", int, 1_000_000, "[0, 4294967295]"),
    Flag("cache_dir", "where models and grades are cached"),
)
STUDY_FLAGS = (
    Flag(
        "blind",
        "also write vote.html, a user study of this many pairs of images, models unnamed; voters must not see "
        "vote_key-STUDY.json, which names them",
        int,
        range="[1, inf)",
        metavar="PAIRS",
    ),
    Flag(
        "votes",
        "count the votes that vote.html saved, and nothing else; the study's key lies in --output_dir or beside them",
        Path,
        nargs="+",
        metavar="FILE",
    ),
)


class Model(NamedTuple):
    """What `--models` says of one model."""

    name: str
    path: str  # of a pipeline or an adapter, or a hub id
    search: str | None


@dataclass(frozen=True)
class Options:
    """The command line, checked. The first of the models is the base that the others are compared with."""

    models: list[Model]
    prompts: str
    caption_column: str
    metrics: list[str]
    output_dir: Path
    num_images: int
    num_inference_steps: int
    guidance_scale: float
    resolution: int | None
    batch_size: int
    export: str | None
    grid_images: int
    seed: int
    blind: int | None
    cache_dir: str | None
    reward_model: str
    reward_options: dict[str, Any]  # keywords of `load_reward`


def parse_args(
    argv: Sequence[str],
    reward_flags: Sequence[Flag],
    check_reward_flags: Callable[[Mapping[str, Any]], None],
    reward_options: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> Options:
    """The flags, checked before anything is loaded.

    Args:
        reward_flags: `--reward_model` and all that configures rewards.
        check_reward_flags: refuses values of flags by raising `UserError`.
        reward_options: what `load_reward` takes of the values of flags.

    Raises:
        UserError: naming the flag and the remedy.
    """
    description = "Is the trained model better, by how much, at what cost, and was the reward gamed?"
    values = vars(parse(description, {"evaluation": FLAGS, "user study": STUDY_FLAGS, "reward": reward_flags}, argv))
    values["models"] = [parse_model(entry) for entry in values["models"]]
    values["metrics"] = values["metrics"] or []
    check_reward_flags(values)
    for spec in values["metrics"]:
        try:
            check_reward_flags({**values, "reward_model": spec})
        except UserError as error:  # it speaks of the flag that rewards are named by elsewhere
            raise UserError(str(error).replace("--reward_model", "--metrics")) from error
    own = {flag.name: values[flag.name] for flag in FLAGS}
    options = Options(
        **own, blind=values["blind"], reward_model=values["reward_model"], reward_options=reward_options(values)
    )
    require(
        options.resolution is None or options.resolution % 8 == 0,
        f"--resolution is {options.resolution}, but SDXL needs a positive multiple of 8",
    )
    names = {model.name for model in options.models}
    require(len(names) == len(options.models), "--models: two models have one name; give each its own")
    base = options.models[0].path
    require(
        not (Path(base) / LORA_FILE).is_file(),
        f"--models: the base {base} is a LoRA adapter; name the pipeline that it was trained on first",
    )
    if options.blind is not None:
        require(len(names) > 1, "--blind needs two models to compare; name another one in --models")
        most = options.num_images * (len(names) * (len(names) - 1) // 2)
        require(
            options.blind <= most,
            f"--blind is {options.blind}, but {options.num_images} images of {len(names)} models make {most} pairs; "
            "ask for fewer or raise --num_images",
        )
    return options


def asks_for_a_count(argv: Sequence[str]) -> bool:
    """Whether a command line is there to count votes."""
    return any(word.partition("=")[0] == "--votes" for word in argv)


def parse_votes(argv: Sequence[str]) -> tuple[list[Path], Path | None]:
    """The files of `--votes`, and `--output_dir` if it is given.

    Raises:
        UserError: another flag is given.
    """
    folder = next(flag for flag in FLAGS if flag.name == "output_dir")
    flags = [replace(folder, required=False), *(flag for flag in STUDY_FLAGS if flag.name == "votes")]
    other = {word.partition("=")[0] for word in argv if word.startswith("--")} - {"--votes", "--output_dir", "--help"}
    require(not other, f"--votes counts votes and nothing else; leave out {', '.join(sorted(other))}")
    values = parse("Count the votes of a user study.", {"user study": flags}, argv)
    return values.votes, values.output_dir


def parse_model(entry: str) -> Model:
    """`NAME=PATH[@SEARCH]`, checked.

    Raises:
        UserError: naming `--models` and the remedy.
    """
    name, separator, source = entry.partition("=")
    require(bool(name and separator and source), f"--models {entry} must be NAME=PATH")
    require(
        name.isidentifier(),
        f"--models {name}=...: the name becomes a folder; use letters, digits and _, and a letter first",
    )
    path, _, search = (source, "", "") if Path(source).expanduser().exists() else source.partition("@")
    if search:
        from sharpening.evaluation.search import parse as parse_search  # imports torch

        parse_search(search)
    local = looks_local(path)
    expanded = str(Path(path).expanduser()) if local else path
    require(
        not local or any((Path(expanded) / file).is_file() for file in MODEL_MARKERS),
        f"--models {path} holds no {' and no '.join(MODEL_MARKERS)}; give a pipeline folder, a LoRA folder or a hub "
        "id",
    )
    return Model(name, expanded, search or None)
