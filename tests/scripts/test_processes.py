"""Runs as their users and machines treat them: two ranks, signals, kill -9, and secrets, through real processes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from tests.support.runs import ROOT, SCRIPTS, launcher_words, metrics, same_files, same_tensors, without_speed
from tiny_world.grader_server import Action

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# Runs the real script on every rank and compares the weights of the ranks before their group is dissolved.
COMPARING_RANKS = """
import hashlib, runpy, sys, time
import torch
from accelerate import Accelerator
from sharpening import run

end_training = Accelerator.end_training

def compare(self):
    digest = hashlib.sha256()
    for model in self._models:
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    digests = [None] * self.num_processes
    torch.distributed.all_gather_object(digests, digest.hexdigest())
    print(f"RANKS {len(digests)} DISTINCT {len(set(digests))}", flush=True)
    time.sleep(run.SECONDS_TO_RELEASE)
    end_training(self)

Accelerator.end_training = compare
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# Of RLHF's gradient, the difference of two that nearly cancel, less is left of float32.
ROUNDING = {"SFT": 1e-4, "RLHF": 2e-2}


@pytest.fixture(params=["SFT", "RLHF"])
def method(request):
    return request.param


EXTRAS = {
    "separate backwards": {"gradient_accumulation_steps": 2},
    "joint backward": {"preset": "released", "gradient_checkpointing": True},
    "guided branches": {"branch_guidance_scale": 3},
    "LoRA": {"use_lora": True, "gradient_checkpointing": True},
}
EFFICIENT = {"preset": "efficient", "num_noisy_latents": 3, "infer_steps": 3, "generation_reuse": 2}


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize(
    ("method", "extra"),
    [
        *(
            pytest.param(method, extra, id=f"{method}-{name}")
            for method in ("SFT", "RLHF")
            for name, extra in EXTRAS.items()
        ),
        pytest.param("RLHF", EFFICIENT, id="RLHF-efficient"),
    ],
    indirect=["method"],
)
def test_two_processes_equal_one_of_twice_the_batch(extra, method, train, flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    common = {"max_train_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 1, "use_ema": True, **extra}
    assert train(flags(**common, train_batch_size=4, output_dir=one)) == 0
    (tmp_path / "compare.py").write_text(COMPARING_RANKS)
    command = [*launcher_words("torchrun"), str(tmp_path / "compare.py"), str(ROOT / SCRIPTS[method])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, *flags(**common, train_batch_size=2, output_dir=two)],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("RANKS 2 DISTINCT 1") == 2
    assert "x 2 processes" in result.stdout
    for left, right in zip(metrics(one), metrics(two), strict=True):
        for name in without_speed(left):
            assert left[name] == pytest.approx(right[name], rel=ROUNDING[method], abs=ROUNDING[method] / 100), name
    file = "pytorch_lora_weights.safetensors" if "use_lora" in extra else WEIGHTS
    left, right = ({name: w.flatten() for name, w in load_file(run / file).items()} for run in (one, two))
    assert left.keys() == right.keys()
    difference = torch.cat([left[name] - right[name] for name in left]).abs()
    # Adam's first steps are nearly signs: where a gradient is all rounding, a weight may go either way.
    assert (difference > 1e-5).float().mean() <= ROUNDING[method]


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("method", ["RLHF"])
def test_two_processes_resume_amid_a_reused_generation(launch, flags, tmp_path):
    options = {"generation_reuse": 3, "checkpointing_steps": 1, "infer_steps": 3, "max_train_steps": 3}
    options |= {"gradient_accumulation_steps": 2, "use_lora": True, "use_ema": True}
    for run, changes in (("whole", {}), ("resumed", {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-2"})):
        result = launch(flags(**options, **changes, output_dir=tmp_path / run), "torchrun")
        assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "whole" / "checkpoint-2" / "pending_1.pt").exists()
    weights = "checkpoint-3/lora/pytorch_lora_weights.safetensors"
    assert same_tensors(tmp_path / "whole" / weights, tmp_path / "resumed" / weights)


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_reward_that_fails_on_one_rank_stops_both(launch, flags, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n\n\ndef moody(images, prompts):\n"
        "    if os.environ['RANK'] == '1':\n        raise OSError('rank 1 fell over')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    result = launch(flags(reward_model=f"{tmp_path}/mine.py:moody"), "torchrun", timeout=120)
    assert result.returncode != 0
    assert "rank 1 fell over" in result.stderr
    assert (tmp_path / "run" / "checkpoint-0" / "state.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_the_step_saves_and_says_interrupted(number, status, method, train, flags, tmp_path):
    options = {"max_train_steps": 500, "checkpointing_steps": 1000}
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / SCRIPTS[method]), *flags(**options)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output[-2000:]
    assert "continue with --resume_from_checkpoint latest" in output
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert len(metrics(run)) == step  # the step that was under way is whole
    resumed = flags(**{**options, "max_train_steps": step + 1}, resume_from_checkpoint="latest")
    assert train(resumed) == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, step + 2))


@pytest.mark.slow
def test_resume_through_accelerate_launch_is_exact(launch, flags, tmp_path):
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "lr_scheduler": "linear", "use_ema": True}
    whole = launch(flags(**options, output_dir=tmp_path / "whole"), "accelerate")
    assert whole.returncode == 0, whole.stderr[-3000:]
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = launch(
        flags(**options, output_dir=tmp_path / "resumed", resume_from_checkpoint=checkpoint), "accelerate"
    )
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    names = [WEIGHTS, f"checkpoint-4/{WEIGHTS}", f"checkpoint-4/{WEIGHTS.replace('unet/', 'unet_ema/')}"]
    assert same_files(tmp_path / "whole", tmp_path / "resumed", [*names, "checkpoint-4/optimizer.bin"]) == []
    assert StableDiffusionXLPipeline.from_pretrained(tmp_path / "resumed").unet is not None


@pytest.mark.slow
def test_planted_keys_reach_no_file_and_no_output(launch, flags, tmp_path, server):
    secrets = ["sk-PLANTED-one", "hf_PLANTED_two"]
    options = {"report_to": "all", "checkpointing_steps": 1, "branch_image_steps": 1, "push_to_hub": True}
    options |= {"cache_dir": tmp_path / "cache", "validation_prompt": "a red circle on a white background"}
    # The grader's key is really used, and its endpoint repeats it in an error.
    server.plan["a red circle on a white background"] = [Action(status=400, error=f"bad image for {secrets[0]}")]
    options |= {"reward_model": "shapes,mllm", "base_url": server.base_url, "reward_failure": "skip"}
    options |= {"validation_steps": 1}
    command = [*flags(**options), "--api_key", secrets[0], f"--hub_token={secrets[1]}"]
    result = launch(command, cwd=tmp_path)
    assert result.returncode == 2  # the push fails without a network, after everything else was written
    assert "--push_to_hub failed" in result.stderr
    assert {request["headers"]["authorization"] for request in server.requests} == {f"Bearer {secrets[0]}"}
    assert "bad image for ***" in result.stdout + result.stderr
    assert "HTTP Request" not in result.stdout + result.stderr  # a line for each request would drown all others
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("mllm_grades" in str(path) for path in written)
    (wandb_run,) = [path for path in written if path.suffix == ".wandb"]
    assert b"reward/best" in wandb_run.read_bytes() and b"reward/component/shapes" in wandb_run.read_bytes()
    assert any(path.name.startswith("events") for path in written)
    assert any("wandb" in str(path) and path.suffix == ".png" for path in written)
    for secret in secrets:
        assert secret not in result.stdout + result.stderr
        assert [str(path) for path in written if secret.encode() in path.read_bytes()] == []


def save_forever(folder, reached):
    """A child that saves checkpoints of a tiny run, step after step, until it is killed."""
    import accelerate
    from diffusers.training_utils import EMAModel

    from sharpening.running import checkpoints
    from tiny_world.make_tiny_sdxl import make_pipeline

    torch.set_num_threads(1)
    unet = make_pipeline(seed=0).unet
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    ema = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)
    accelerator.prepare(unet, optimizer)
    checkpoints.register_checkpointing(accelerator, unet, ema, schedule)
    found = checkpoints.prepare_output(accelerator, folder, "latest")
    step = 0
    if found is not None:
        accelerator.load_state(str(found))
        step = checkpoints.checkpoint_step(found)
        assert all(torch.all(parameter == step) for parameter in unet.parameters())
        assert all(torch.all(parameter == -step) for parameter in ema.shadow_params)
    (reached / f"started-{step}").touch()
    while True:
        step += 1
        with torch.no_grad():
            for parameter, average in zip(unet.parameters(), ema.shadow_params, strict=True):
                parameter.fill_(step)
                average.fill_(-step)
        checkpoints.save_checkpoint(accelerator, folder, step, {}, 2)
        (reached / f"saved-{step}").touch()


@pytest.mark.slow
def test_kill_while_checkpointing_never_costs_a_saved_checkpoint(tmp_path):
    """20 kills at random moments: each time the newest checkpoint loads, holds its step and is the newest saved."""
    folder, reached = tmp_path / "run", tmp_path / "reached"
    folder.mkdir()
    reached.mkdir()
    chance = random.Random(0)
    (tmp_path / "parent.py").write_text(FORKING_PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), str(folder), str(reached)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
    )  # fmt: skip
    leftovers = 0
    try:
        for _ in range(20):
            last_saved = newest(reached, "saved")
            parent.stdin.write("go\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            wait_until(lambda last=last_saved, pid=child: newest(reached, "saved") > last or not alive(pid))
            assert alive(child), "the child could not load the newest checkpoint"
            (started,) = reached.glob("started-*")
            # A kill between the rename and the note may leave one checkpoint more than was noted, never one less.
            assert int(started.name.split("-")[1]) in (last_saved, last_saved + 1)
            started.unlink()
            time.sleep(chance.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline().strip() == "dead"
            leftovers += len(list(folder.glob(".checkpoint-*")))
    finally:
        parent.kill()
    assert leftovers > 5  # the kills did hit half-written or half-deleted folders


FORKING_PARENT = """
import os, sys
from pathlib import Path
from test_processes import save_forever
# So that children start at once:
import accelerate, diffusers, tiny_world.make_tiny_sdxl, sharpening.running.checkpoints

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        save_forever(Path(sys.argv[1]), Path(sys.argv[2]))
    print(child, flush=True)
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def newest(folder: Path, kind: str) -> int:
    return max((int(path.name.split("-")[1]) for path in folder.glob(f"{kind}-*")), default=0)


def alive(process_id: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process_id}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return False


def wait_until(condition, timeout: float = 60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_help_lists_every_flag_without_importing_torch(method):
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(ROOT / SCRIPTS[method])!r}, '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for flag in ("--num_noisy_latents", "--reward_model", "--dry_run", "--resume_from_checkpoint"):
        assert flag in result.stdout
