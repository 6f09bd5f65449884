"""Is the trained model better, by how much, at what cost, and was the reward gamed?

    python scripts/evaluate.py --models base=MODEL tuned=outputs/run lora=outputs/lora --prompts prompts.txt \
        --reward_model clip --metrics image_reward aesthetic --output_dir outputs/evaluation

The first model is the base that the others are compared with. `--reward_model` is what was trained on, `--metrics` are
rewards that were not, which rise too if the images got better and not the reward gamed. A folder that holds a LoRA
adapter is applied to the base; `NAME=PATH@best_of_n:8` samples with a search for `--reward_model` (see
`sharpening/evaluation/search.py`). Prompts are taken in turn until `--num_images` are drawn; image i of every model
starts from the same noise. Images are kept in `--output_dir`: the same command again draws only what is missing.

Writes `summary.json`, `summary.csv`, `scores.csv` (every image), `grid.png`, and `report.html`, which shows all of it.

`--blind PAIRS` also writes `vote.html`, a page on which people vote between two unnamed models' images; what they save
is counted by

    python scripts/evaluate.py --votes FILE... --output_dir outputs/evaluation
"""

import sys
from collections.abc import Sequence

from reward import REWARD_FLAGS, check_reward_flags, load_reward, reward_options
from sharpening.errors import exit_status
from sharpening.evaluation.flags import asks_for_a_count, parse_args, parse_votes


def main(argv: Sequence[str]) -> int:
    """Evaluate, or count votes; returns the exit status.

    Raises:
        UserError: naming the flag and the remedy.
    """
    if asks_for_a_count(argv):
        from sharpening.evaluation.votes import count  # imports pillow, which --help need not wait for

        return count(*parse_votes(argv))
    options = parse_args(argv, REWARD_FLAGS, check_reward_flags, reward_options)
    from sharpening.evaluation.command import evaluate  # imports torch, which a mistyped flag need not wait for

    return evaluate(options, load_reward)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
