"""Rewards of a user's own: importing them from a file or a module, and constructing those that are classes."""

import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sharpening.errors import UserError, did_you_mean, first_line
from sharpening.rewards.spec import is_file


def load_scorer(target: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The function `(images, prompts) -> Tensor (B,)` behind `module:Name` or `file.py:Name`.

    Name is that function, an object with a method `get_reward`, or a class of such objects, which is constructed with
    those of the options that its constructor has.

    Raises:
        UserError: naming `--reward_model`, if it cannot be imported, found or constructed, or is none of these.
    """
    location, _, name = target.partition(":")
    try:
        module = _import_file(location) if is_file(location) else importlib.import_module(location)
    except Exception as error:
        raise UserError(
            f"--reward_model {target}: importing {location} failed with {first_line(error)}; mend it, or install "
            "what it needs"
        ) from error
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f"--reward_model {target}: {location} holds no {name}{did_you_mean(name, known)}; name one of its "
            "functions or classes"
        )
    found = getattr(module, name)
    if inspect.isclass(found):
        try:
            found = construct(found, options)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--reward_model {target}: constructing {name} failed with {first_line(error)}; its constructor is "
                "called with those of device=, dtype= and cache_dir= that it has, and nothing else"
            ) from error
    scorer = getattr(found, "get_reward", found)
    if not callable(scorer):
        raise UserError(
            f"--reward_model {target}: {name} is neither a function nor has it a method get_reward(images, prompts); "
            "add one"
        )
    return scorer


def construct(kind: Callable[..., Any], options: dict[str, Any]) -> Any:
    """An instance, given those of the options that its constructor names and that are set."""
    named = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in options.items() if key in named and value is not None})


def _import_file(location: str) -> ModuleType:
    path = Path(location).expanduser().resolve()
    name = f"reward_file:{path}"  # cannot clash with a module, and tracebacks show where it came from
    if name in sys.modules:
        return sys.modules[name]
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
