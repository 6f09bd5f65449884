"""What is gained by walking on while a grader works: the score pass against one that waits at every step.

    python benchmarks/grading.py --seconds 2

A server on this machine speaks the OpenAI protocol and takes so long for every grade, however many are under way. Both
ways score branches of the trained tiny SDXL, in turns.
"""

from __future__ import annotations

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
from sharpening.errors import exit_status
from sharpening.flags import Flag, parse
from sharpening.model_source import Source
from sharpening.rewards.calling import Reward
from sharpening.selection import Scores, score_branches
from sharpening.trajectory import Branches, Schedule
from tiny_world.grader_server import Action, GraderServer

MODEL = Path(__file__).resolve().parents[1] / "tiny_world" / "sdxl"
PROMPTS = ["a red circle on a white background", "a blue square on a black background"]
FLAGS = (
    Flag("seconds", "that a grade takes", float, 2.0, "[0, inf)"),
    Flag("num_noisy_latents", "n, branches per prompt", int, 3, "[1, inf)"),
    Flag("trajectory_nums", "m, steps of each branch", int, 3, "[1, inf)"),
    Flag("concurrency", "grades under way at once", int, 32, "[1, inf)"),
    Flag("rounds", "score passes of each way", int, 5, "[1, inf)"),
)


def score_pass(reward: Reward, n: int, m: int) -> Callable[[int, bool], Scores]:
    """A function of a seed, and of whether every step is waited for, that scores n branches of m steps per prompt."""
    source = Source("pretrained_model_name_or_path", str(MODEL))
    unet = source.load(sdxl.UNet2DConditionModel, "unet", dtype=torch.float32).eval()
    vae = source.load(sdxl.AutoencoderKL, "vae", dtype=torch.float32)
    encoders = sdxl.TextEncoders.load(source, torch.device("cpu"), torch.float32)
    unconditional = sdxl.unconditional_embedding(source, encoders)
    schedule = Schedule.from_config(source.read_json("scheduler/scheduler_config.json"), 25)
    embeds, pooled = encoders.encode(PROMPTS)
    condition = sdxl.Condition(embeds, pooled, sdxl.default_time_ids(len(PROMPTS), 32, torch.device("cpu")))
    walking = sdxl.Denoiser(unet, condition.rows(torch.arange(len(PROMPTS) * n) // n), unconditional, 1.0)

    def run(seed: int, wait: bool) -> Scores:
        def judge(latents: Tensor, rows: list[int]) -> Callable[[], tuple]:
            verdict = reward.begin(sdxl.decode_latents(vae, latents, 8), [PROMPTS[row // n] for row in rows])
            if not wait:
                return verdict
            known = verdict()
            return lambda: known

        x_0, eps = torch.randn(2, len(PROMPTS) * n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        branches = Branches.begin(schedule, x_0, eps, torch.full((len(eps),), 500))
        return score_branches(walking.rows, judge, schedule, branches, m, len(eps))[0]

    return run


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit status."""
    args = parse(__doc__.splitlines()[0], {"grading": FLAGS}, argv)
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
