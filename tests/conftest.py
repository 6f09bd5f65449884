"""What tests share: a random and a trained tiny SDXL, images, one cache, and ways to run a script or reuse a run."""

import contextlib
import hashlib
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from filelock import FileLock

# Two busy processes with two threads each are ten times slower than one thread each.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

from tests.support import tiny_rewards
from tests.support.browser import opened_browser
from tests.support.runs import ROOT, SCRIPTS, launcher_words
from tiny_world.grader_server import GraderServer


def pytest_collection_modifyitems(config, items):
    """Side by side, the longest tests go first, so that no process waits for another at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Give a folder that the first to ask for its name makes: once for all processes of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each process has a folder of its own in it
    root = root / "made_once"
    root.mkdir(exist_ok=True)

    def get(name, make):
        folder, made = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what a failure left
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def world(made_once):
    """Paths of a random tiny SDXL, of a folder of 12 captioned images, and of a cache that all runs share."""
    from tiny_world.make_shapes_dataset import write_dataset
    from tiny_world.make_tiny_sdxl import build_random_sdxl

    def make(root):
        build_random_sdxl(root / "model")
        write_dataset(root / "shapes", num_images=12, seed=0)

    root = made_once("world", make)
    return SimpleNamespace(root=root, model=root / "model", shapes=root / "shapes", cache=root / "cache")


@pytest.fixture(scope="session")
def tiny_sdxl():
    """The trained tiny SDXL: its VAE, its schedule of 10 steps, its reward, and its unguided model of captions."""
    import torch
    from diffusers import UNet2DConditionModel

    from reward import load_reward
    from sharpening import model_source, sdxl
    from sharpening.trajectory import Schedule

    source = model_source.Source("pretrained_model_name_or_path", str(ROOT / "tiny_world" / "sdxl"))
    unet = source.load(UNet2DConditionModel, "unet", dtype=torch.float32).eval()
    vae = source.load(sdxl.AutoencoderKL, "vae", dtype=torch.float32)
    encoders = sdxl.TextEncoders.load(source, torch.device("cpu"), torch.float32)
    unconditional = sdxl.unconditional_embedding(source, encoders)
    schedule = Schedule.from_config(source.read_json("scheduler/scheduler_config.json"), 10)

    def model_of(captions):
        embeds, pooled = encoders.encode(captions)
        condition = sdxl.Condition(embeds, pooled, sdxl.default_time_ids(len(captions), 32, embeds.device))
        return lambda rows: sdxl.branch_model(unet, condition.rows(rows), unconditional, 1.0)

    return SimpleNamespace(vae=vae, schedule=schedule, reward=load_reward("shapes"), model_of=model_of)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A random open_clip model: its state dict on disk, the model itself and its own preprocessing."""
    folder = tmp_path_factory.mktemp("clip")
    yield tiny_rewards.write_clip(folder)
    tiny_rewards.forget_clip(folder)


@pytest.fixture(scope="session")
def aesthetic_head(tmp_path_factory):
    return tiny_rewards.write_aesthetic_head(tmp_path_factory.mktemp("aesthetic"))


@pytest.fixture(scope="session")
def tiny_pickscore(tmp_path_factory):
    return tiny_rewards.write_pickscore(tmp_path_factory.mktemp("pickscore"))


@pytest.fixture(scope="session")
def tiny_blip_vqa(tmp_path_factory):
    return tiny_rewards.write_blip_vqa(tmp_path_factory.mktemp("blip_vqa"))


@pytest.fixture(scope="session")
def tiny_grounding_dino(tmp_path_factory):
    return tiny_rewards.write_grounding_dino(tmp_path_factory.mktemp("grounding_dino"))


@pytest.fixture(scope="session")
def tiny_owlv2(tmp_path_factory):
    return tiny_rewards.write_owlv2(tmp_path_factory.mktemp("owlv2"))


@pytest.fixture(scope="session")
def tiny_image_reward(tmp_path_factory):
    return tiny_rewards.write_image_reward(tmp_path_factory.mktemp("image_reward"))


@pytest.fixture
def file_limit():
    """A context in which this process writes no file beyond some bytes: a full disk's errors, with EFBIG."""

    @contextlib.contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def no_progress_bars(monkeypatch):
    import datasets

    monkeypatch.setenv("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()


@pytest.fixture
def server(monkeypatch):
    """A grader at `server.base_url`, without any key in the environment and with short pauses between retries."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    with GraderServer() as server:
        yield server


@pytest.fixture(scope="module")
def visit():
    """Open a file in Chromium: `visit(path, width=1280, dark=False) -> Tab`; skipped where there is no browser."""
    with opened_browser() as visit:
        yield visit


@pytest.fixture
def method():
    """Which script the fixtures below run. A module whose tests hold for both overrides this one with two params."""
    return "SFT"


@pytest.fixture
def flags(world, tmp_path, method):
    """Build a command line: the base run, changed by keyword; None drops a flag, True makes a switch."""
    quick = {} if method == "SFT" else {"infer_steps": 5}  # 25 steps to generate are most of a tiny run's time

    def build(**changes):
        values = {
            "pretrained_model_name_or_path": world.model,
            "train_data_dir": world.shapes,
            "cache_dir": world.cache,
            "output_dir": tmp_path / "run",
            "resolution": 32,
            "train_batch_size": 2,
            "max_train_steps": 2,
            "reward_model": "shapes",
            "report_to": "none",
            "seed": 0,
            **quick,
            **changes,
        }
        return [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in values.items()
            if value is not None and value is not False
        ]

    return build


@pytest.fixture
def train(method):
    """Run the script in this process and return its exit status; global state is put back afterwards."""
    from accelerate.state import AcceleratorState, GradientState

    script = importlib.import_module(SCRIPTS[method].removesuffix(".py").replace("/", "."))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv = list(sys.argv)

    def run(command):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        sys.argv[1:] = command
        try:
            return script.cli(command)
        finally:
            sys.argv[:] = argv
            for number, handler in handlers.items():
                signal.signal(number, handler)

    yield run
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def no_result(monkeypatch):
    """Leave out the pipeline and the curve at the end of a run, a third of a tiny run's time."""
    monkeypatch.setattr("sharpening.run.Run.finish", lambda run, unet, ema: run.close())


@pytest.fixture
def trained_once(method, train, flags, made_once, request):
    """The folder of a run that the first test to ask for it makes; for reading only."""

    def run(**changes):
        command = flags(**changes, output_dir=None)
        key = (method, "no_result" in request.fixturenames, *command)
        name = f"trained-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"

        def make(folder):
            assert train([*command, f"--output_dir={folder}"]) == 0

        return made_once(name, make)

    return run


@pytest.fixture
def launch(method):
    """Start the script as a user does and wait for it: by python, by accelerate, or by torchrun on two ranks."""

    def run(command, launcher="python", cwd=ROOT, timeout=300):
        return subprocess.run(
            [*launcher_words(launcher), str(ROOT / SCRIPTS[method]), *command],
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    return run
