"""Samples of a reference are a fixed data set: drawn once, judged once, the same after a resume."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.baselines import literal
from tests.support.runs import metrics

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(params=["DPO", "BEST_OF_N"])
def method(request):
    return request.param


@pytest.fixture
def kept(method, prompts, quick):
    """Flags of a run whose samples are kept."""
    return {**prompts, **quick, **({"samples_of": "base"} if method == "BEST_OF_N" else {})}


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_prompt_keeps_its_samples_whatever_the_model_has_become(lora, method, train, flags, kept, seen):
    """4 prompts in 2 sets: an epoch shows each prompt in one set, so epochs 0, 2, 4 show the same."""
    options = {**kept, "sets": 2, "train_batch_size": 4, "learning_rate": 1e-2, "use_lora": lora}
    assert train(flags(**options, max_train_steps=5)) == 0
    steps = options["infer_steps"]
    drawn = [len(literal.of(seen, "generate", step)) for step in range(5)]
    assert drawn == [steps, steps, 0, 0, 0]  # the samples of all prompts share a slice

    def chosen(step):
        """What a step trains on of each prompt."""
        rows, draws = literal.drawn(step, 4, 4)
        x, t, _ = literal.together(literal.of(seen, "train", step))
        each = len(x) // 4
        latents = literal.clean(x, t, literal.noising(draws).eps[:, 0].repeat_interleave(each, 0))
        return torch.stack([latents[rows.index(row) * each : (rows.index(row) + 1) * each] for row in range(4)])

    of_step = [chosen(step) for step in range(5)]
    assert of_step[0].shape[1] == (2 if method == "DPO" else 1)
    for one, other in ((0, 2), (0, 4), (1, 3)):
        torch.testing.assert_close(of_step[one], of_step[other], rtol=1e-3, atol=1e-3)
    assert not any(torch.allclose(one, other, atol=0.1) for one, other in zip(of_step[0], of_step[1], strict=True))


@pytest.mark.usefixtures("no_result")
def test_samples_are_judged_once_unless_without_a_score(train, flags, kept, tmp_path):
    """A grader is paid once for a fixed data set; where it failed it is asked again."""
    asked = tmp_path / "asked.txt"
    body = (
        "from pathlib import Path\n"
        f"    asked = Path({str(asked)!r})\n    first = not asked.exists()\n"
        "    with asked.open('a') as log:\n        log.write(f'{len(prompts)} {prompts[0]}\\n')\n"
        "    return images.mean((1, 2, 3)) * (float('nan') if first else 1)"
    )
    options = {**kept, "sets": 2, "train_batch_size": 4, "reward_failure": "skip"}
    options["reward_model"] = literal.write_reward(tmp_path, body)
    assert train(flags(**options, max_train_steps=5)) == 0
    calls = asked.read_text().splitlines()
    assert {call[:2] for call in calls} == {"2 "}  # both samples of a prompt, and no other's
    first, *others = calls
    assert len(others) == 4 * 2 and others.count(first) == 2  # its two sets, one of them again
    assert all(others.count(call) == 2 for call in others) and len(set(others)) == 4
    lines = metrics(tmp_path / "run")
    assert [line["reward/failure_rate"] for line in lines] == [0.25, 0, 0, 0, 0]
    assert lines[2]["reward/mean"] == pytest.approx(lines[4]["reward/mean"], rel=1e-6)
    assert lines[1]["reward/mean"] == pytest.approx(lines[3]["reward/mean"], rel=1e-6)
    assert lines[1]["reward/mean"] != lines[2]["reward/mean"]


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_resumed_run_draws_the_same_samples_again(lora, train, flags, kept, tmp_path):
    """Batches of 3 of 4 prompts: the resumed run draws a prompt in another company than the whole run did, up to the
    rounding of which it is the same."""
    options = {**kept, "sets": 2, "train_batch_size": 3, "checkpointing_steps": 1, "max_train_steps": 4}
    options |= {"use_lora": lora, "learning_rate": 1e-3}
    assert train(flags(**options, output_dir=tmp_path / "whole")) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = {"output_dir": tmp_path / "resumed", "resume_from_checkpoint": "latest"}
    assert train(flags(**options, **resumed)) == 0
    name = "checkpoint-4/" + ("lora/pytorch_lora_weights.safetensors" if lora else WEIGHTS)
    states = (sorted(load_file(tmp_path / run / name).items()) for run in ("whole", "resumed"))
    ours, theirs = (torch.cat([part.flatten() for _, part in state]) for state in states)
    assert (ours - theirs).norm() <= 1e-3 * ours.norm()
    ours, theirs = metrics(tmp_path / "whole")[2:], metrics(tmp_path / "resumed")
    for name in ("loss", "grad_norm", "reward/mean", "reward/best"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-3), name
