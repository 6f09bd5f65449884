"""A disk that takes no more: one sentence that says what is kept and how to go on, and a run that does go on.

The disk is a small tmpfs in a namespace of its own, or the system's limit on the size of a file, which fails the same
writes.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from diffusers import StableDiffusionXLPipeline

from tests.support.runs import ROOT, SCRIPTS, launcher_words, metrics, same_files

MIB = 2**20
OPTIONS = {"max_train_steps": 2, "checkpointing_steps": 1, "trajectory_nums": 1}
HOW = "free space on the disk of --output_dir, then continue with --resume_from_checkpoint latest"
STATE = ("unet/diffusion_pytorch_model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl")


def the_error(text):
    (line,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert "Traceback" not in text
    return line


# The UNet is a file of 1.02 MiB by safetensors, the optimizer one of 2.1 MiB by torch.
@pytest.mark.parametrize("size", [MIB, 1.5 * MIB], ids=["safetensors", "torch"])
def test_checkpoint_that_does_not_fit_leaves_the_one_before(
    size, train, flags, trained_once, tmp_path, capsys, file_limit
):
    whole = trained_once(**OPTIONS)
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-1", run / "checkpoint-1")
    shutil.copy(whole / "metrics.jsonl", run)
    with file_limit(size):
        assert train(flags(**OPTIONS, resume_from_checkpoint="latest")) == 1
    why = "File too large" if size == MIB else "torch.save could not write to the end of a file"
    said = f"step 2: the checkpoint cannot be written ({why}); {HOW}; {run}/checkpoint-1 is whole"
    assert the_error(capsys.readouterr().err) == f"error: {said}"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", "logs", "metrics.jsonl"]
    assert train(flags(**OPTIONS, resume_from_checkpoint="latest")) == 0
    assert same_files(whole / "checkpoint-2", run / "checkpoint-2", STATE) == []
    assert [line["step"] for line in metrics(run)] == [1, 2]


def test_result_that_does_not_fit_is_written_when_the_run_is_continued(
    train, flags, trained_once, tmp_path, capsys, file_limit
):
    run = tmp_path / "run"
    shutil.copytree(trained_once(**OPTIONS) / "checkpoint-2", run / "checkpoint-2")
    with file_limit(MIB):
        assert train(flags(**OPTIONS, resume_from_checkpoint="latest")) == 1
    said = f"the result cannot be written (File too large); {HOW}; the run is saved in {run}/checkpoint-2"
    assert the_error(capsys.readouterr().err) == f"error: {said}"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "logs", "metrics.jsonl"]
    assert train(flags(**OPTIONS, resume_from_checkpoint="latest")) == 0
    assert StableDiffusionXLPipeline.from_pretrained(run).unet is not None


def test_failure_that_cannot_be_saved_is_said_with_the_reason_for_both(train, flags, tmp_path, capsys, file_limit):
    (tmp_path / "mine.py").write_text("def broken(images, prompts):\n    raise OSError('the model fell over')\n")
    with file_limit(MIB):
        assert train(flags(reward_model=f"{tmp_path}/mine.py:broken")) == 1
    error = the_error(capsys.readouterr().err)
    assert "the model fell over" in error and "step 0: the checkpoint cannot be written" in error
    assert error.endswith("no checkpoint is whole yet, so that begins anew")


START_TRACKERS = """
import resource, sys
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from sharpening.errors import exit_status
from sharpening.running import tracking

project = ProjectConfiguration(project_dir=sys.argv[1], logging_dir=sys.argv[1])
accelerator = Accelerator(cpu=True, log_with="tensorboard", project_config=project)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
sys.exit(exit_status(lambda: tracking.start_trackers(accelerator, {"seed": 0}, "id", "tensorboard")))
"""


def test_tracker_that_cannot_begin_for_want_of_space_says_so(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", START_TRACKERS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert re.search(
        r"error: --report_to tensorboard: .*; free space on the disk of --output_dir$", result.stderr, re.M
    )


SMALL_DISK = """
mkdir "$DISK" && mount -t tmpfs -o size="$SIZE" tmpfs "$DISK" || exit 77
"$@"
status=$?
cp -r "$DISK" "$KEPT"
exit $status
"""


@pytest.fixture
def on_small_disk(tmp_path, method):
    """Launch on a disk of its own; its process, with what the disk held in `tmp_path / "kept"`."""

    def run(size, launcher, command):
        words = [*launcher_words(launcher), str(ROOT / SCRIPTS[method]), *command]
        extra = {"DISK": str(tmp_path / "disk"), "KEPT": str(tmp_path / "kept"), "SIZE": str(size)}
        result = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "bash", "-c", SMALL_DISK, "bash", *words], cwd=ROOT, timeout=240,
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), **extra},
        )  # fmt: skip
        if result.returncode == 77 or "unshare" in result.stderr[:20]:
            pytest.skip("this system lets nobody mount a tmpfs")
        return result

    return run


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_full_disk_stops_both_ranks_and_the_run_goes_on_elsewhere(on_small_disk, train, flags, tmp_path):
    options = {**OPTIONS, "max_train_steps": 3, "report_to": "tensorboard"}
    result = on_small_disk(5 * MIB, "torchrun", flags(**options, output_dir=tmp_path / "disk" / "run"))
    assert result.returncode == 1
    said = f"{HOW}; {tmp_path}/disk/run/checkpoint-1 is whole"
    ours = [line[line.index("error: ") :] for line in result.stderr.splitlines() if "error: " in line]
    assert len(ours) == 2 and all(line.endswith("checkpoint-1 is whole") for line in ours)
    assert any(line.startswith("error: step 2: the checkpoint cannot be written") for line in ours)
    assert any(said in line for line in ours)
    # Both may meet the full disk; one that does not is told of it.
    assert all("another process cannot write" in line or said in line for line in ours)
    kept = tmp_path / "kept" / "run"
    assert sorted(path.name for path in kept.glob("*checkpoint*")) == ["checkpoint-1"]
    assert 'train_sft_diffusion_sharpening_sdxl.py", line' not in result.stderr  # no trace of ours
    assert train(flags(**options, output_dir=kept, resume_from_checkpoint="latest")) == 0
    assert [line["step"] for line in metrics(kept)] == [1, 2, 3]
