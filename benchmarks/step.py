"""What an optimizer step costs: seconds by phase, FLOPs and peak memory, against a literal reading and fine-tuning.

    python benchmarks/step.py --model mid --method sft --rounds 5 --output step.json
    python benchmarks/step.py --model sdxl --method rlhf --mixed_precision bf16 --use_8bit_adam --decoder tiny

Runs the training script itself, on random weights and made-up data. After each of its steps, in the same process, the
same step is done by `benchmarks/naive.py` (all branches with graph, decodes in float32 with graph, backward through
the sampler, reference on all branches) and by a plain fine-tuning step of the same batch; and what a step of one
branch must cost is done once: a forward without gradient, a decode and a reward. Ratios are step by step.

Every branch has all of its m steps. Memory is what a step adds to what is held before it: on a GPU by the allocator,
on a CPU by counting tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import FunctionType
from unittest.mock import patch

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import naive
from benchmarks.models import SIZES, TINY_DECODER, write_pipeline
from benchmarks.reporting import describe_machine, spread
from sharpening import model_source, run, sdxl
from sharpening.arguments import OneSentenceParser, require
from sharpening.errors import exit_status
from tests.support.objective import LiveMemory

SCRIPTS = {"sft": "train_sft_diffusion_sharpening_sdxl", "rlhf": "train_rlhf_diffusion_sharpening_sdxl"}
RIVALS = ("naive", "plain", "branch_step")
INFER_STEPS = 25
BETA = 2500.0


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that costs nothing: mean brightness, (B,)."""
    return images.mean((1, 2, 3))


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Clock:
    """Seconds by phase; time inside an inner phase is not that of the outer one."""

    seconds: dict[str, float] = field(default_factory=dict)
    stack: list[str] = field(default_factory=lambda: ["rest"])
    since: float = 0.0

    def charge(self) -> None:
        """Give the time since the last turn to the phase under way."""
        synchronise()
        now = time.perf_counter()
        self.seconds[self.stack[-1]] = self.seconds.get(self.stack[-1], 0.0) + now - self.since
        self.since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.charge()
        self.stack.append(name)
        try:
            yield
        finally:
            self.charge()
            self.stack.pop()

    def start(self) -> None:
        synchronise()
        self.seconds, self.since = {}, time.perf_counter()

    def stop(self) -> dict[str, float]:
        self.charge()
        return dict(self.seconds)

    def timed(self, function: Callable, name: str) -> Callable:
        """A function whose calls, the turns of the generator and the call of the function that it returns count as a
        phase."""

        def wrapped(*args: object, **kwargs: object) -> object:
            with self.phase(name):
                result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                return self._turns(result, name)
            return self.timed(result, name) if isinstance(result, FunctionType) else result

        return wrapped

    def _turns(self, turns: Iterator, name: str) -> Iterator:
        while True:
            with self.phase(name):
                try:
                    turn = next(turns)
                except StopIteration:
                    return
            yield turn


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Within, what the scripts call is charged phase by phase."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from sharpening import trajectory
    from sharpening.rewards.calling import Reward

    reference = sdxl.reference_unet

    @contextmanager
    def timed_reference(*args: object) -> Iterator:
        with clock.phase("reference"), reference(*args) as unet:
            yield unet

    with ExitStack() as stack:
        stack.enter_context(patch.object(sdxl, "reference_unet", timed_reference))
        for owner, attribute, name in (
            (trajectory, "generate", "generate"),
            (trajectory, "score_branches", "score"),
            (sdxl, "decode_latents", "decode"),
            (Reward, "begin", "reward"),
            (trajectory, "weighted_errors", "train"),
            (Accelerator, "backward", "train"),
            (Accelerator, "clip_grad_norm_", "optimizer"),
            (AcceleratedOptimizer, "step", "optimizer"),
        ):
            timed = clock.timed(getattr(owner, attribute), name)
            stack.enter_context(patch.object(owner, attribute, timed))
        yield


@contextmanager
def peak_memory(result: dict[str, float]) -> Iterator[None]:
    """Bytes at the peak beyond those held at the start, in `result["peak"]`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        result["peak"] = torch.cuda.max_memory_allocated() - before
        return
    with LiveMemory() as memory:
        yield
    result["peak"] = memory.peak


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def random_condition(unet: UNet2DConditionModel, rows: int, resolution: int) -> sdxl.Condition:
    """What a UNet takes beside latents, made up for images of `resolution` pixels."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    parts = [torch.randn(rows, 77, config.cross_attention_dim), torch.randn(rows, pooled)]
    time_ids = sdxl.default_time_ids(rows, resolution, unet.device)
    return sdxl.Condition(*(part.to(unet.device) for part in parts), time_ids)


class Rivals:
    """The same step by other means, on a UNet of their own; a batch is random, of the script's shapes."""

    def __init__(self, args: argparse.Namespace, flags: argparse.Namespace, source: model_source.Source):
        self.args, self.flags = args, flags
        self.device = torch.device(
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        )
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)
        self.unet = sdxl.load_unet(flags, source, self.device, self.dtype)
        self.reference = None
        if args.method == "rlhf":
            self.reference = sdxl.load_frozen_unet(flags, source, self.device, self.dtype)
        vae = sdxl.load_vae(flags, source, self.device, torch.float32)
        self.vae = vae.to(memory_format=torch.contiguous_format)  # as a library loads it
        if flags.reward_vae:
            self.decoder = sdxl.load_reward_decoder(flags, self.device, self.dtype)
        else:
            self.decoder = sdxl.load_vae(flags, source, self.device, self.dtype)
        self.parameters = sdxl.trainable_parameters(self.unet)
        self.optimizer = run.make_optimizer(self.parameters, flags, 1)
        self.scheduler = naive.DDIMScheduler.from_config(source.read_json("scheduler/scheduler_config.json"))
        self.scheduler.set_timesteps(INFER_STEPS)
        self.shape = sdxl.latent_shape(self.vae, args.resolution)
        self.generator = torch.Generator().manual_seed(0)

    def condition(self, rows: int) -> sdxl.Condition:
        return random_condition(self.unet, rows, self.args.resolution)

    def noise(self, rows: int) -> Tensor:
        return torch.randn(rows, *self.shape, generator=self.generator).to(self.device)

    def timestep(self) -> int:
        return int(torch.randint(first_timestep(self.args), 1000, (1,), generator=self.generator))

    def update(self, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def naive(self) -> None:
        """The algorithm read literally; RLHF generates a latent for each branch, as the released code does."""
        n, total = self.args.num_noisy_latents, 0.0
        for _ in range(self.args.batch):
            condition = self.condition(1).rows(torch.zeros(n, dtype=torch.long))
            x_0 = self.noise(1).expand(n, -1, -1, -1)
            if self.args.method == "rlhf":
                # In a context of its own: autocast would reuse the weights that it casts here, without a gradient.
                with self.autocast():
                    x_0 = naive.generate(self.unet, self.scheduler, self.noise(n), condition)
            with self.autocast():
                rewards, errors, reference_errors = naive.walk(
                    self.unet, self.vae, self.scheduler, lambda images: brightness(images, []), condition, x_0,
                    self.noise(n), self.timestep(), self.args.trajectory_nums, self.reference,
                )  # fmt: skip
                if self.args.method == "sft":
                    loss = naive.sft_loss(rewards, errors)
                else:
                    loss = naive.rlhf_loss(rewards, errors, reference_errors, BETA)
            total = total + loss / self.args.batch
        self.update(total)

    def plain(self) -> None:
        """Standard fine-tuning as diffusers' own script does it: one noise, one forward, one backward."""
        rows = self.args.batch
        with self.autocast():
            eps = self.noise(rows)
            t = torch.randint(0, 1000, (rows,), generator=self.generator).to(self.device)
            x_t = self.scheduler.add_noise(self.noise(rows), eps, t)
            output = naive.forward(self.unet, x_t, t, self.condition(rows))
            loss = torch.nn.functional.mse_loss(output, eps)
        self.update(loss)

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The UNet's output for one row, without gradient."""
        with self.autocast():
            return naive.forward(self.unet, self.noise(1), self.timestep(), self.condition(1))

    def branch_step(self) -> None:
        """What a step of one branch cannot do without."""
        brightness(sdxl.decode_latents(self.decoder, self.forward(), 1), [])


def first_timestep(args: argparse.Namespace) -> int:
    """The lowest timestep from which a branch has all of its steps."""
    return (args.trajectory_nums - 1) * (1000 // INFER_STEPS)


def write_data(folder: Path, resolution: int, count: int = 8) -> None:
    """A few noisy pictures with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "text": f"picture number {index}"} for index in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def script_flags(args: argparse.Namespace, folder: Path) -> list[str]:
    """The command line of the training script."""
    flags = {
        "pretrained_model_name_or_path": folder / "model", "train_data_dir": folder / "data",
        "cache_dir": folder / "cache", "output_dir": folder / "run", "resolution": args.resolution,
        "train_batch_size": args.batch, "num_noisy_latents": args.num_noisy_latents,
        "trajectory_nums": args.trajectory_nums, "infer_steps": INFER_STEPS, "max_train_steps": args.rounds + 3,
        "reward_model": f"{Path(__file__).resolve()}:brightness", "mixed_precision": args.mixed_precision,
        "timestep_bias_strategy": "range", "timestep_bias_begin": first_timestep(args), "timestep_bias_end": 1000,
        "timestep_bias_multiplier": 1e12, "report_to": "none", "validation_epochs": 0, "seed": 0,
        "score_batch_size": args.score_batch_size, "decode_batch_size": args.decode_batch_size,
        "checkpointing_steps": 1_000_000, "branch_image_steps": 1_000_000, "learning_rate": 1e-6,
    }  # fmt: skip
    if args.decoder == "tiny":
        flags["reward_vae"] = folder / "model" / TINY_DECODER
    if args.method == "rlhf":
        flags |= {"guidance_scale": 1, "latents_per_prompt": args.latents_per_prompt, "beta_dpo": BETA}
        flags["generation_batch_size"] = args.score_batch_size
    switches = [name for name in ("use_lora", "gradient_checkpointing", "use_8bit_adam") if getattr(args, name)]
    return [*(f"--{name}={value}" for name, value in flags.items()), *(f"--{name}" for name in switches)]


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        best = min(best, timed(lambda: left @ right))
    return 2 * size**3 / best


def measure(args: argparse.Namespace, folder: Path, beside: Sequence[str] = RIVALS) -> dict:
    """Seconds by round and phase of the script and of the rivals beside it, FLOPs and peak memory of a step."""
    from sharpening.running import tracking

    dtype = torch.float16 if args.mixed_precision == "fp16" else torch.float32
    write_pipeline(args.model, folder / "model", dtype)
    write_data(folder / "data", args.resolution)
    command = script_flags(args, folder)
    script = import_module(SCRIPTS[args.method])
    flags = script.parse_args(command)
    rivals = Rivals(args, flags, model_source.pipeline_source(flags))
    others: dict[str, Callable[[], None]] = {name: getattr(rivals, name) for name in beside}
    clock, steps = Clock(), iter(range(args.rounds + 3))
    result: dict = {"seconds": {name: [] for name in ("script", *others)}, "phases": [], "flops": {}, "peak_bytes": {}}
    counting: list = []

    def finish_step(log: tracking.StepLog, step: int, metrics: dict[str, float]) -> None:
        """Stands in for `StepLog.write`: the script has just ended a step."""
        phases, index = clock.stop(), next(steps)
        if index == 1:  # the first warmed up
            flops = counting.pop()
            flops.__exit__(None, None, None)
            result["flops"]["script"] = flops.get_total_flops()
            for name, work in {**others, "forward": rivals.forward}.items():
                with FlopCounterMode(display=False) as flops:
                    work()
                result["flops"][name] = flops.get_total_flops()
            rows = args.batch * args.num_noisy_latents * args.trajectory_nums
            result["flops"]["score"] = rows * result["flops"].pop("forward")
        elif index == 2:
            memory, peak = counting.pop()
            memory.__exit__(None, None, None)
            result["peak_bytes"]["script"] = peak["peak"]
            for name, rival in others.items():
                peak = {}
                with peak_memory(peak):
                    rival()
                result["peak_bytes"][name] = peak["peak"]
        else:
            for name, rival in others.items():
                seconds = timed(rival)
                if index:
                    result["seconds"][name].append(seconds)
            if index:
                result["phases"].append(phases)
                result["seconds"]["script"].append(sum(phases.values()))
        if index == 0:
            counting.append(FlopCounterMode(display=False))
            counting[0].__enter__()
        elif index == 1:
            peak = {}
            counting.append((peak_memory(peak), peak))
            counting[0][0].__enter__()
        clock.start()

    with patch.object(tracking.StepLog, "write", finish_step), watched(clock):
        clock.start()
        if script.cli(command):
            raise RuntimeError("the training script failed; it says above why")
    result["matmul_peak"] = matmul_peak(rivals.device, rivals.dtype)
    return result


def ratio(result: dict, to: str) -> str:
    """The script's seconds as a share of a rival's, step by step: median and range."""
    shares = [ours / theirs for ours, theirs in zip(result["seconds"]["script"], result["seconds"][to], strict=True)]
    return spread(shares)


def report(result: dict) -> str:
    """The figures as text."""
    lines = []
    for name, seconds in result["seconds"].items():
        median, flops = statistics.median(seconds), result["flops"][name]
        lines.append(
            f"{name:>11}  {median:8.3f} s  {flops / 1e12:8.3f} TFLOP  {flops / median / 1e12:7.3f} TFLOP/s, "
            f"{flops / median / result['matmul_peak']:.0%} of the matrix product's  "
            f"peak {result['peak_bytes'][name] / 2**30:6.2f} GiB"
        )
    names = list(dict.fromkeys(name for phases in result["phases"] for name in phases))
    spent = {name: statistics.median(phases.get(name, 0.0) for phases in result["phases"]) for name in names}
    rate = result["flops"]["score"] / spent["score"]
    lines.append(f"      score  {rate / 1e12:.3f} TFLOP/s, {rate / result['matmul_peak']:.0%} of the matrix product's")
    lines.append("     phases  " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in spent.items()))
    for rival in ("naive", "plain"):
        memory = result["peak_bytes"]["script"] / result["peak_bytes"][rival]
        lines.append(f"  against {rival}: {ratio(result, rival)} of its time, {memory:.2f}x of its peak")
    return "\n".join(lines)


def make_parser(description: str) -> OneSentenceParser:
    """The flags of every measurement of the scripts' steps."""
    parser = OneSentenceParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=SIZES, default="mid")
    parser.add_argument("--resolution", type=int, help="pixels; unset: 32 for tiny, else 512")
    parser.add_argument("--batch", type=int, default=1, help="prompts in a step")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--decoder", choices=["vae", "tiny"], default="vae", help="what decodes for the reward")
    parser.add_argument("--score_batch_size", type=int, default=8)
    parser.add_argument("--decode_batch_size", type=int, default=4)
    for name in ("use_lora", "gradient_checkpointing", "use_8bit_adam"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed")
    return parser


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with what follows from them.

    Raises:
        UserError: naming the flag and the remedy.
    """
    args.resolution = args.resolution or (32 if args.model == "tiny" else 512)
    for name in ("num_noisy_latents", "trajectory_nums", "batch", "rounds", "score_batch_size", "decode_batch_size"):
        value = getattr(args, name, 1)
        require(value >= 1, f"--{name} is {value}, but it must be at least 1")
    return args


def main(argv: list[str]) -> int:
    """Measure, print, write; returns the exit status."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--method", choices=sorted(SCRIPTS), default="sft")
    parser.add_argument("--num_noisy_latents", type=int, default=3)
    parser.add_argument("--trajectory_nums", type=int, default=3)
    parser.add_argument("--latents_per_prompt", choices=["1", "n"], default="n", help="of the RLHF script")
    parser.add_argument("--output", type=Path, help="write every figure here as JSON")
    args = checked(parser.parse_args(argv))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    print(f"{describe_machine()}; {' '.join(argv)}")
    print(report(result))
    if args.output:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.output.write_text(json.dumps({"machine": describe_machine(), "settings": settings, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
