"""The grammar of `--reward_model`: which rewards, of which models, with which weights.

    clip                                        an entry of the catalogue in reward.py
    clip:0.01,jpeg_compressibility:1.0          weighted sum; a weight left out is 1, a negative one is a penalty
    clip:ViT-H-14:0.5                           an entry with a model of its own, and a weight
    image_reward:path/to/ImageReward.pt         a model is what that entry says: a name, a path or a hub id
    ./my_reward.py:redness                      a function, class or object of a file
    my_package.rewards:Redness:0.5              the same of an importable module, with a weight

A path holds no comma. Nothing here imports torch or the user's files, so a mistyped spec is refused in a moment.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sharpening.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Component:
    """One term of a reward.

    Attributes:
        name: what its curve is called.
        weight: its factor in the sum.
        target: what to load: a key of the catalogue, or `module:Name` or `file.py:Name`; then `name` is that Name.
        model: for an entry of the catalogue, the model that the spec names, or None.
    """

    name: str
    weight: float
    target: str
    model: str | None = None


def parse(spec: str, catalogue: Mapping[str, Callable[..., object]]) -> list[Component]:
    """The components of a spec, in its order; two of one name are told apart by their models.

    Checks all that can be checked without importing or loading anything: names, weights, that files exist and that
    modules can be found.

    Raises:
        UserError: naming `--reward_model`, what is wrong with it and the remedy.
    """
    if not spec.strip():
        raise UserError(f"--reward_model is empty; give {_choices(catalogue)}")
    entries = [entry.strip() for entry in spec.split(",")]
    if not all(entries):
        raise UserError(f"--reward_model {spec} has a comma with nothing on one side; remove it")
    components = [_parse_entry(entry, catalogue) for entry in entries]
    names = [component.name for component in components]
    components = [
        replace(component, name=f"{component.name}:{component.model.replace('/', '-')}")
        if component.model and names.count(component.name) > 1
        else component
        for component in components
    ]
    names = [component.name for component in components]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--reward_model {spec} names {name} {names.count(name)} times; name it once with the total weight, "
                "or rename one of two rewards of your own that share a name"
            )
    return components


def is_file(location: str) -> bool:
    """Whether the part of an entry before its name is the path of a file rather than a module."""
    return location.endswith(".py") or "/" in location


def _parse_entry(entry: str, catalogue: Mapping[str, Callable[..., object]]) -> Component:
    head, *rest = (part.strip() for part in entry.split(":"))
    if head in catalogue:
        model = None
        if rest and all(rest) and "model" in inspect.signature(catalogue[head]).parameters:
            rest, weight = (rest[:-1], rest[-1:]) if _is_number(rest[-1]) else (rest, [])
            model, rest = ":".join(rest) or None, weight
        return Component(head, _parse_weight(entry, rest), head, model)
    location_is_file = is_file(head)
    is_module = not location_is_file and all(part.isidentifier() for part in head.split("."))
    if not (location_is_file or (is_module and (rest or "." in head))):
        raise UserError(
            f"--reward_model {entry} is unknown{did_you_mean(head, catalogue)}; give {_choices(catalogue)}"
        )
    if not rest or not rest[0].isidentifier():
        raise UserError(f"--reward_model {entry} does not say which function or class to take; write {head}:NAME")
    weight = _parse_weight(entry, rest[1:])
    if is_module and not _is_importable(head.partition(".")[0]):
        raise UserError(
            f"--reward_model {entry}: Python finds no module {head}{did_you_mean(head, catalogue)}; give the path of "
            "its file (path/to/file.py:Name), or put its folder on PYTHONPATH"
        )
    if location_is_file and not Path(head).expanduser().is_file():
        raise UserError(f"--reward_model {entry}: there is no file {head}; correct the path")
    return Component(rest[0], weight, f"{head}:{rest[0]}")


def _parse_weight(entry: str, rest: list[str]) -> float:
    """The weight that the parts of an entry after its name give, 1 if there are none."""
    if not rest:
        return 1.0
    if len(rest) > 1 or not _is_number(rest[0]):
        raise UserError(
            f"--reward_model {entry}: {':'.join(rest) or 'nothing'} is not a number; what follows the name is its "
            "weight, such as 0.5"
        )
    weight = float(rest[0])
    if not math.isfinite(weight) or weight == 0:
        raise UserError(
            f"--reward_model {entry} has the weight {rest[0]}; give a finite number other than 0, or drop the reward"
        )
    return weight


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_importable(package: str) -> bool:
    """Whether Python finds a package; for outermost ones only, as finding a submodule imports what is around it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # loaded, but without a spec, as `__main__` is
        return True


def _choices(catalogue: Mapping[str, object]) -> str:
    return f"{', '.join(catalogue)}, or your own as path/to/file.py:Name or module:Name"
