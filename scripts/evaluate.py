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

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from reward import load_reward
from sharpening import arguments
from sharpening.errors import exit_status
from sharpening.evaluation.flags import parse_args
from sharpening.flags import Flag


def reward_flags() -> tuple[Flag, ...]:
    """The reward flags of `sharpening.arguments`."""
    parser = argparse.ArgumentParser(add_help=False)
    arguments.add_reward_flags(parser.add_argument_group("reward"))
    return tuple(
        Flag(a.dest, a.help, a.type or str, a.default, choices=tuple(a.choices or ()), metavar=a.metavar)
        for a in parser._actions
    )


def check_reward_flags(values: Mapping[str, Any]) -> None:
    """Refuse reward flags that cannot work."""
    arguments.check_reward_flags(argparse.Namespace(**values))


def reward_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_reward` takes of the flags."""
    return arguments.reward_flags(argparse.Namespace(**values))


def main(argv: Sequence[str]) -> int:
    """Evaluate; returns the exit status.

    Raises:
        UserError: naming the flag and the remedy.
    """
    options = parse_args(argv, reward_flags(), check_reward_flags, reward_options)
    from sharpening.evaluation.command import evaluate  # imports torch, which a mistyped flag need not wait for

    return evaluate(options, load_reward)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
