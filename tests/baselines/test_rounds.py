"""`--rounds` of Diffusion-DPO: what begins anew with each, and that a resumed run is in the same round."""

import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from sharpening import sdxl
from sharpening.reference import Reference
from tests.baselines import literal
from tests.support.runs import metrics, same_files, same_tensors

ADAPTER = "pytorch_lora_weights.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
COURSE = {"lr_scheduler": "linear", "lr_warmup_steps": 0, "learning_rate": 1e-3}
ROUNDS = {**COURSE, "rounds": 2, "max_train_steps": 8, "checkpointing_steps": 4}  # of four prompts: two epochs each


@pytest.fixture
def method():
    return "DPO"


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_round_begins_from_the_average_with_all_else_fresh(lora, train, flags, prompts, seen, quick, tmp_path):
    assert train(flags(**ROUNDS, **prompts, **quick, use_ema=True, use_lora=lora)) == 0
    before, begun = seen.updates[3].weights, seen.updates[4].weights
    checkpoint = tmp_path / "run" / "checkpoint-4"
    if lora:
        averaged = torch.load(checkpoint / "lora_ema" / "ema.pt", weights_only=True)["shadow_params"]
    else:
        averaged = [*UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet_ema").parameters()]
    assert all(map(torch.equal, begun, averaged))
    assert not all(map(torch.equal, begun, before))
    lines = metrics(tmp_path / "run")
    rates = [line["lr"] for line in lines]
    assert rates[:4] == rates[4:] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    kl = [line["preference/kl"] for line in lines]
    assert max(kl[0], kl[4]) < 1e-9 < min(kl[1:4] + kl[5:])
    states = [update.state for update in seen.updates]
    assert states[0] == states[4] == 0 < min(states[1:4] + states[5:])


@pytest.mark.usefixtures("no_result")
def test_without_an_average_a_round_begins_from_the_weights(train, flags, prompts, seen, quick, tmp_path):
    assert train(flags(**ROUNDS, **prompts, **quick)) == 0
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "run" / "checkpoint-4", subfolder="unet").parameters()
    assert all(map(torch.equal, seen.updates[4].weights, saved))


@pytest.mark.usefixtures("no_result")
def test_averaging_begins_anew(train, flags, prompts, seen, quick, tmp_path):
    """The average forgets at first (diffusers' warm-up): after one step of a round it is the new weights."""
    options = {**ROUNDS, **prompts, **quick, "checkpointing_steps": 1, "use_ema": True}
    assert train(flags(**options)) == 0

    def moved(step):
        """How much of the way from the first weights of a round to those after its first step the average went."""
        run = tmp_path / "run" / f"checkpoint-{step}"
        new, average = (load_file(run / folder / WEIGHTS)["conv_in.weight"] for folder in ("unet", "unet_ema"))
        old = seen.updates[step - 1].weights[0]
        return float((average - old).norm() / (new - old).norm())

    assert moved(1) == pytest.approx(moved(5), rel=1e-3)
    assert moved(4) < 0.9 * moved(1)


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_pairs_of_a_round_are_drawn_once_by_its_own_reference(lora, train, flags, world, prompts, seen, quick):
    """Four steps of two prompts: each round draws the samples of four prompts in its first two."""
    assert train(flags(**ROUNDS, **prompts, **quick, use_lora=lora)) == 0
    generated = [sum(len(part.x) for part in literal.of(seen, "generate", step)) for step in range(8)]
    rows = 2 * 2 * 2 * 2  # prompts, samples, steps, guidance
    assert generated == [rows, rows, 0, 0] * 2
    unet = literal.trainable(world.model, lora)
    for step in (0, 4, 5):
        literal.put(seen.updates[4 if step >= 4 else 0].weights, unet)
        for purpose in ("generate", "reference"):
            for part in literal.of(seen, purpose, step):
                with torch.no_grad():
                    expected = sdxl.predict_output(unet, part.x, part.t, part.condition)
                torch.testing.assert_close(part.output, expected, rtol=1e-5, atol=1e-5)

    def latents_of(step):
        latents = literal.samples(literal.of(seen, "generate", step), 2, 5.0).split(quick["num_noisy_latents"])
        return dict(zip(literal.drawn(step, 4, 2)[0], latents, strict=True))

    first, second = latents_of(0) | latents_of(1), latents_of(4) | latents_of(5)
    assert first.keys() == second.keys() == {0, 1, 2, 3}
    assert not any(torch.allclose(first[row], second[row], atol=0.1) for row in first)


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_resume_at_a_boundary_and_inside_a_round_is_exact(lora, train, flags, quick, prompts, tmp_path):
    """Three rounds of two steps: after step 2 and 4 a round has ended; after step 3 and 5 the weights that were its
    reference are in the checkpoint alone."""
    options = {**COURSE, **prompts, **quick, "rounds": 3, "max_train_steps": 6, "checkpointing_steps": 1}
    options |= {"use_lora": lora, "use_ema": True, "train_batch_size": 4}
    whole = tmp_path / "whole"
    assert train(flags(**options, output_dir=whole)) == 0
    for step in (2, 3, 4, 5):
        resumed = tmp_path / f"resumed{step}"
        shutil.copytree(whole / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        shutil.copy(whole / "metrics.jsonl", resumed)
        assert train(flags(**options, output_dir=resumed, resume_from_checkpoint="latest")) == 0
        folders = ("lora", "lora_ema") if lora else ("unet", "unet_ema")
        for folder in folders:
            name = f"checkpoint-6/{folder}/{ADAPTER if lora else WEIGHTS}"
            assert same_tensors(whole / name, resumed / name)
        names = ["checkpoint-6/optimizer.bin", "checkpoint-6/custom_checkpoint_0.pkl"]
        assert same_files(whole, resumed, names) == []
        for name in ("loss", "lr", "preference/kl", "reward/mean", "grad_norm"):
            assert [line[name] for line in metrics(whole)] == [line[name] for line in metrics(resumed)], name


@pytest.mark.usefixtures("no_result")
def test_reference_of_a_round_is_saved_once_for_all_processes(train, flags, quick, prompts, tmp_path):
    """A process that finds no file of its own, because there were fewer, must not fall back to the base."""
    options = {**prompts, **quick, "rounds": 2, "max_train_steps": 2, "checkpointing_steps": 1}
    assert train(flags(**options)) == 0
    names = [{path.name for path in (tmp_path / "run" / f"checkpoint-{step}").glob("*.pt")} for step in (1, 2)]
    assert names == [{"shared.pt"}] * 2
    first, second = (torch.load(tmp_path / "run" / f"checkpoint-{step}" / "shared.pt") for step in (1, 2))
    assert "reference" not in first and "reference" in second


@pytest.mark.usefixtures("no_result")
def test_rounds_that_are_parts_of_another_number_of_steps_are_refused(train, flags, quick, prompts, capsys):
    options = {**prompts, **quick, "rounds": 2, "checkpointing_steps": 2}
    assert train(flags(**options, max_train_steps=2)) == 0
    assert train(flags(**options, max_train_steps=4, resume_from_checkpoint="latest")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--max_train_steps is 4, but the rounds of this checkpoint are parts of 2 steps" in error


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(("steps", "rounds"), [(5, 4), (3, 3), (4, 3)])
def test_there_are_as_many_rounds_as_asked_for(steps, rounds, train, flags, quick, prompts, tmp_path, monkeypatch):
    """Also where the steps cannot be shared out evenly: after each but the last a run begins anew."""
    begun = []
    renew = Reference.renew
    monkeypatch.setattr(Reference, "renew", lambda self: begun.append(1) or renew(self))
    assert train(flags(**prompts, **quick, rounds=rounds, max_train_steps=steps)) == 0
    assert len(begun) == rounds - 1
