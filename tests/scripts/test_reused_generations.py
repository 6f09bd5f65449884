"""Generations that serve several steps (`--generation_reuse`): exact resumption, and only for their own prompts."""

import shutil

import pytest
import torch

from sharpening.draws import Draws, timestep_probabilities
from sharpening.trajectory import Schedule
from tests.support.objective import SDXL
from tests.support.runs import metrics, same_files, same_tensors

SAMPLES = {"reward_on": "sample", "latents_per_prompt": "n"}
QUICK = {"infer_steps": 2, "trajectory_nums": 1, "num_noisy_latents": 2}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def method():
    return "RLHF"


@pytest.mark.parametrize(
    "extra",
    [
        {},
        pytest.param(SAMPLES, marks=pytest.mark.slow),
        pytest.param({"use_lora": True}, marks=pytest.mark.slow),
    ],
    ids=["trajectory", "sample", "LoRA"],
)
def test_resume_amid_a_reused_generation_is_exact(extra, train, flags, tmp_path):
    """Step 4 of 6 uses latents that the weights of step 3 made: a checkpoint after step 3 must hold them."""
    options = {
        **QUICK,
        "max_train_steps": 6,
        "generation_reuse": 3,
        "checkpointing_steps": 1,
        "use_ema": True,
        **extra,
    }
    options |= {"gradient_accumulation_steps": 2}
    assert train(flags(**options, output_dir=tmp_path / "whole")) == 0
    for step in (3, 4):
        resumed = tmp_path / f"resumed{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        assert (resumed / f"checkpoint-{step}" / "pending_0.pt").exists() == (step == 4)
        assert train(flags(**options, output_dir=resumed, resume_from_checkpoint="latest")) == 0
        weights = "lora/pytorch_lora_weights.safetensors" if "use_lora" in extra else WEIGHTS
        assert same_tensors(tmp_path / "whole" / "checkpoint-6" / weights, resumed / "checkpoint-6" / weights)
        assert same_files(tmp_path / "whole", resumed, ["checkpoint-6/optimizer.bin"]) == []
        ours, theirs = metrics(tmp_path / "whole")[step:], metrics(resumed)
        assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    "changes",
    [{}, {"generation_reuse": 4}, {"train_batch_size": 4}, {"max_train_samples": 5}, {"num_noisy_latents": 3}],
    ids=lambda changes: next(iter(changes), "none"),
)
def test_latents_of_a_checkpoint_serve_their_own_prompts_alone(
    changes, train, flags, trained_once, tmp_path, forwards
):
    options = {**QUICK, "generation_reuse": 2, "latents_per_prompt": "n", "checkpointing_steps": 3}
    checkpoint = trained_once(**options, max_train_steps=3) / "checkpoint-3"
    shutil.copytree(checkpoint, tmp_path / "run" / checkpoint.name)
    forwards.clear()
    resumed = {**options, **changes, "max_train_steps": 4}
    assert train(flags(**resumed, resume_from_checkpoint="latest")) == 0
    generated = [forward for forward in forwards if forward.without_prompt.any()]  # guidance is for generation alone
    assert bool(generated) == bool(changes)


@pytest.mark.usefixtures("no_result")
def test_reused_generation_meets_new_noise_and_timesteps(train, flags, tmp_path, forwards):
    """Draw g shows its prompt in as many steps as its latents serve, each with a number of its own."""
    assert train(flags(**QUICK, max_train_steps=4, generation_reuse=2, checkpointing_steps=1)) == 0
    scored = [f for f in forwards if not f.gradient and not f.frozen and not f.without_prompt.any()]
    draws, schedule = Draws(0, timestep_probabilities(1000)), Schedule.from_config(SDXL, 2)
    for step, (forward, numbers) in enumerate(zip(scored, ([0, 2], [1, 3], [4, 6], [5, 7]), strict=True)):
        # A checkpoint holds latents only while they have steps to serve.
        checkpoint = tmp_path / "run" / f"checkpoint-{step // 2 * 2 + 1}"
        (made,) = torch.load(checkpoint / "pending_0.pt", weights_only=True)
        drawn = draws.noising(numbers, 2, (4, 8, 8))
        t = drawn.t.repeat_interleave(2)
        assert torch.equal(forward.t, t)
        x_0 = made["latents"].repeat_interleave(2, 0)
        torch.testing.assert_close(forward.x, schedule.add_noise(x_0, drawn.eps.flatten(0, 1), t))
