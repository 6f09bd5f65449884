"""What is gained by walking on while a grader works: the score pass against one that waits at every step.

    python benchmarks/grading.py --seconds 2

A server on this machine speaks the OpenAI protocol and takes so long for every grade, however many are under way. Both
ways score branches of the trained tiny SDXL, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.reporting import describe_machine, spread
from reward import load_reward
from sharpening import sdxl
from sharpening.arguments import OneSentenceParser, require, require_at_least_1
from sharpening.errors import exit_status
from sharpening.model_source import Source
from sharpening.trajectory import Schedule, Scores, score_branches
from tiny_world.grader_server import Action, GraderServer

MODEL = Path(__file__).resolve().parents[1] / "tiny_world" / "sdxl"
PROMPTS = ["a red circle on a white background", "a blue square on a black background"]


def score_pass(reward: object, n: int, m: int) -> Callable[[int, bool], Scores]:
    """A function of a seed, and of whether every step is waited for, that scores n branches of m steps per prompt."""
    source = Source("pretrained_model_name_or_path", str(MODEL))
    unet = source.load(sdxl.UNet2DConditionModel, "unet", dtype=torch.float32).eval()
    vae = source.load(sdxl.AutoencoderKL, "vae", dtype=torch.float32)
    encoders = sdxl.TextEncoders.load(source, torch.device("cpu"), torch.float32)
    unconditional = sdxl.unconditional_embedding(source, encoders)
    schedule = Schedule.from_config(source.read_json("scheduler/scheduler_config.json"), 25)
    embeds, pooled = encoders.encode(PROMPTS)
    condition = sdxl.Condition(embeds, pooled, sdxl.default_time_ids(len(PROMPTS), 32, torch.device("cpu")))

    def model_of(rows: Tensor) -> tuple:
        return sdxl.branch_model(unet, condition.rows(rows // n), unconditional, 1.0)

    def run(seed: int, wait: bool) -> Scores:
        def judge(latents: Tensor, rows: Tensor) -> Callable[[], tuple]:
            verdict = reward.begin(sdxl.decode_latents(vae, latents, 8), [PROMPTS[row // n] for row in rows])
            if not wait:
                return verdict
            known = verdict()
            return lambda: known

        noise = torch.randn(len(PROMPTS) * n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        return score_branches(model_of, judge, schedule, noise, torch.full((len(noise),), 500), m, len(noise))

    return run


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit status."""
    parser = OneSentenceParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="that a grade takes")
    parser.add_argument("--num_noisy_latents", type=int, default=3)
    parser.add_argument("--trajectory_nums", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=32, help="grades under way at once")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    require_at_least_1(args, "num_noisy_latents", "trajectory_nums", "concurrency", "rounds")
    require(args.seconds >= 0, f"--seconds is {args.seconds}, but it must not be negative")
    spent: dict[bool, list[float]] = {False: [], True: []}
    with GraderServer() as server, tempfile.TemporaryDirectory() as cache:
        server.default = Action(delay=args.seconds)
        reward = load_reward("mllm", base_url=server.base_url, cache_dir=cache, mllm_concurrency=args.concurrency)
        run = score_pass(reward, args.num_noisy_latents, args.trajectory_nums)
        run(0, False)  # the first is slower
        for seed in range(1, args.rounds + 1):
            for wait, seconds in spent.items():
                started = time.perf_counter()
                run(seed * 2 + wait, wait)  # other images: a grade that is known is not asked for again
                seconds.append(time.perf_counter() - started)
    shares = [beside / waiting for beside, waiting in zip(spent[False], spent[True], strict=True)]
    print(f"{describe_machine()}; {' '.join(argv)}")
    ours = statistics.median(spent[False])
    print(
        f"{args.seconds:g} s a grade: {ours:.2f} s a score pass, {spread(shares)} of the time of waiting at every step"
    )
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
