"""`--fsdp` on two gloo ranks: what it computes is what DDP computes, and nothing whole lies on a rank."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from tests.support.runs import ROOT, SCRIPTS, metrics, same_tensors, without_speed
from tiny_world.make_shapes_dataset import write_pairs

RANK = ROOT / "tests" / "support" / "rank.py"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FAILING_REWARD = """
import os

def failing(images, prompts):
    if os.environ["RANK"] == "1":
        raise OSError("rank 1 fell over")
    return images.mean((1, 2, 3))
"""
STEPS = 5
SHORT = 3
UNEVEN = "SFT", "RLHF", "BEST_OF_N"  # ranks whose weights are whole make different numbers of forwards
# Slices of odd sizes, branches that end below t = 0 before others do, validation images that two ranks cannot share,
# samples that one rank has kept and the other has still to draw.
OPTIONS = {
    "SFT": {
        "infer_steps": 5, "score_batch_size": 3, "train_rows": 4, "use_ema": True, "validation_steps": 3,
        "validation_prompt": "a red circle on a white background", "num_validation_images": 3, "validation_epochs": 0,
    },
    "RLHF": {
        "infer_steps": 5, "train_rows": 5, "score_batch_size": 2, "use_ema": True, "num_noisy_latents": 2,
        "beta_dpo": 100,  # which multiplies rounding, too
    },
    "DPO": {
        "rounds": 2, "infer_steps": 3, "num_noisy_latents": 2, "train_rows": 4, "use_ema": True, "max_train_steps": 5,
        "checkpointing_steps": 4,
    },
    "BEST_OF_N": {
        "samples_of": "base", "infer_steps": 3, "num_noisy_latents": 2, "generation_batch_size": 2,
        "max_train_samples": 5,
    },
    "DDPO": {"infer_steps": 3, "trajectory_nums": 2, "num_noisy_latents": 2},
    "D3PO": {"infer_steps": 3, "guidance_scale": 1},
    "DPO_DATASET": {"beta_dpo": 100},
}  # fmt: skip


def on_two_ranks(folder, lines, timeout=540):
    """What each rank noted of each line, (script, command, file_limit), and what they said."""
    file = folder / "lines.json"
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in lines]
    ports = [each.getsockname()[1] for each in listening]
    for each in listening:
        each.close()
    file.write_text(
        json.dumps(
            [
                {"script": SCRIPTS[name], "command": command, "port": port, "file_limit": limit}
                for (name, command, limit), port in zip(lines, ports, strict=True)
            ]
        )
    )
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    said = [(folder / f"said-{rank}.txt").open("w+") for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(file)], stdout=to, stderr=subprocess.STDOUT, cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, start_new_session=True,
        )
        for rank, to in enumerate(said)
    ]  # fmt: skip
    try:
        for rank in ranks:
            rank.wait(timeout)
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)  # with its forks
    texts = [(folder / f"said-{rank}.txt").read_text() for rank in range(2)]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-3000:] for text in texts)
    notes = [
        [json.loads(line) for line in (folder / f"lines.json.{rank}").read_text().splitlines()] for rank in (0, 1)
    ]
    return [*zip(*notes, strict=True)], texts


@pytest.fixture(scope="module")
def runs(world, made_once):
    """Folders of runs by name, with `notes` of both ranks; made once."""

    def make(folder):
        def line(name, script, limit=None, **changes):
            values = {
                "pretrained_model_name_or_path": world.model, "train_data_dir": world.shapes, "cache_dir": world.cache,
                "output_dir": folder / name, "resolution": 32, "train_batch_size": 2, "reward_model": "shapes",
                "report_to": "none", "seed": 0, "learning_rate": 1e-3, "max_train_steps": SHORT,
                **OPTIONS[script], **changes,
            }  # fmt: skip
            if script == "DPO_DATASET":
                del values["train_data_dir"]
                values["dataset_name"] = folder / "pairs"
            words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in values.items()]
            return name, (script, words, limit)

        write_pairs(folder / "pairs", 12)
        (folder / "mine.py").write_text(FAILING_REWARD)
        fails = {"reward_model": f"{folder}/mine.py:failing", "fsdp": True, "validation_steps": 0}
        lines = dict(
            [
                line("SFT", "SFT", max_train_steps=STEPS, checkpointing_steps=SHORT),
                line("SFT fsdp", "SFT", max_train_steps=STEPS, checkpointing_steps=SHORT, fsdp=True),
                line("SFT resumed", "SFT", fsdp=True, checkpointing_steps=SHORT),
                line("SFT again", "SFT", fsdp=True, max_train_steps=STEPS, resume_from_checkpoint="latest",
                     output_dir=folder / "SFT resumed"),
                line("SFT whole again", "SFT", max_train_steps=STEPS,
                     resume_from_checkpoint=folder / "SFT fsdp" / f"checkpoint-{SHORT}"),
                line("SFT parts again", "SFT", max_train_steps=STEPS, fsdp=True,
                     resume_from_checkpoint=folder / "SFT" / f"checkpoint-{SHORT}"),
                line("through", "SFT", backprop_through_sampler=True, max_train_steps=1),
                line("through fsdp", "SFT", backprop_through_sampler=True, max_train_steps=1, fsdp=True),
                line("reward fails", "SFT", **fails),
                line("disk is full", "SFT", 500_000, fsdp=True, checkpointing_steps=1, validation_steps=0),
                *(line(name, name) for name in OPTIONS if name != "SFT"),
                *(line(f"{name} fsdp", name, fsdp=True) for name in OPTIONS if name != "SFT"),
                line("DPO again", "DPO", fsdp=True, resume_from_checkpoint=folder / "DPO fsdp" / "checkpoint-4"),
                line("RLHF samples fsdp", "RLHF", fsdp=True, preset="efficient", num_noisy_latents=3,
                     gradient_checkpointing=True, infer_steps=3, mixed_precision="bf16"),
                line("RLHF samples", "RLHF", preset="efficient", num_noisy_latents=3, infer_steps=3,
                     mixed_precision="bf16"),
            ]
        )  # fmt: skip
        notes, texts = on_two_ranks(folder, [*lines.values()])
        (folder / "notes.json").write_text(json.dumps(dict(zip(lines, notes, strict=True))))
        (folder / "said.json").write_text(json.dumps(texts))

    return made_once("fsdp", make)


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two processes"), pytest.mark.timeout(600)]


@pytest.fixture
def notes(runs):
    return json.loads((runs / "notes.json").read_text())


@pytest.mark.parametrize("name", [*OPTIONS, "through"])
def test_curves_are_those_of_whole_weights(name, runs):
    whole, parts = metrics(runs / name), metrics(runs / f"{name} fsdp")
    assert len(whole) == len(parts) == {"SFT": STEPS, "DPO": STEPS, "through": 1}.get(name, SHORT)
    for one, other in zip(whole, parts, strict=True):
        assert without_speed(other) == pytest.approx(without_speed(one), rel=1e-4, abs=1e-5)
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-5)


def test_nothing_whole_lies_on_a_rank(notes):
    for name in OPTIONS:
        whole, parts = notes[name], notes[f"{name} fsdp"]
        assert all(rank["here"] == [rank["elements"]] * 3 for rank in whole)
        for rank, of_whole in zip(parts, whole, strict=True):
            assert rank["elements"] == of_whole["elements"]
            held, averaged = of_whole["unets"] / rank["elements"], of_whole["averages"] / rank["elements"]
            assert held == pytest.approx(1 if name in ("SFT", "DDPO") else 2)  # with a reference
            assert averaged == pytest.approx(float(OPTIONS[name].get("use_ema", 0)))
            assert rank["unets"] < 0.6 * of_whole["unets"] and rank["averages"] <= 0.6 * of_whole["averages"]
            assert rank["notes"] == 0
            assert all(0.4 * rank["elements"] < here < 0.6 * rank["elements"] for here in rank["here"])
        assert sum(rank["here"][0] for rank in parts) == parts[0]["elements"]


def test_ranks_make_the_same_forwards(notes):
    """Whole weights need not: there, a branch that has ended is walked no further, and kept samples are not drawn."""
    for name in UNEVEN:
        assert notes[name][0]["forwards"] != notes[name][1]["forwards"]
    for name in OPTIONS:
        assert len({rank["forwards"] for rank in notes[f"{name} fsdp"]}) == 1


@pytest.mark.parametrize("name", [name for name in OPTIONS if "validation_prompt" not in OPTIONS[name]])
def test_cost_is_what_all_ranks_put_through_their_unets(name, runs, notes):
    """Forwards that a rank makes for another's sake are made, and count."""
    for run in (name, f"{name} fsdp"):
        last = metrics(runs / run)[-1]
        rows = last["cost/rows_trained"] + last["cost/rows_without_gradient"]
        assert rows == sum(rank["rows"] for rank in notes[run]) > 0


def test_resumed_run_equals_an_uninterrupted_one(runs):
    assert same_tensors(runs / "SFT fsdp" / WEIGHTS, runs / "SFT resumed" / WEIGHTS)
    lines = [[*map(without_speed, metrics(runs / name))] for name in ("SFT fsdp", "SFT resumed")]
    assert lines[0] == lines[1]


def test_checkpoint_is_that_of_a_run_on_whole_weights(runs):
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        for folder in (runs / name / f"checkpoint-{SHORT}" for name in ("SFT", "SFT fsdp"))
    ]
    assert names[0] == names[1]
    for continued in ("SFT whole again", "SFT parts again"):
        for line, after in zip(metrics(runs / "SFT")[SHORT:], metrics(runs / continued), strict=True):
            assert after["loss"] == pytest.approx(line["loss"], rel=1e-5, abs=1e-5)


def test_resumed_round_has_its_reference(runs):
    """The second of two rounds began at step 4, the last that the checkpoint knows."""
    assert without_speed(metrics(runs / "DPO again")[0]) == without_speed(metrics(runs / "DPO fsdp")[4])


@pytest.mark.parametrize("name", ["SFT", "RLHF", "DPO"])
def test_pipeline_is_whole_and_loads(name, runs):
    whole, parts = (load_file(runs / run / WEIGHTS) for run in (name, f"{name} fsdp"))
    assert whole.keys() == parts.keys()
    # Adam divides by roots of tiny squares, so rounding shows in the weights: a tenth of one update.
    assert all((whole[key] - parts[key]).abs().max() < 1e-4 for key in whole)
    configs = [(runs / run / "unet" / "config.json").read_text() for run in (name, f"{name} fsdp")]
    assert configs[0] == configs[1]
    pipeline = StableDiffusionXLPipeline.from_pretrained(runs / f"{name} fsdp")
    assert len(pipeline.unet.state_dict()) == len(whole)


def test_low_precision_and_recomputed_activations(runs):
    """Weights are gathered in bf16, where DDP converts them in each forward; norms, too, see rounded weights."""
    for one, other in zip(metrics(runs / "RLHF samples"), metrics(runs / "RLHF samples fsdp"), strict=True):
        assert other["reward/mean"] == pytest.approx(one["reward/mean"], abs=2e-2)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.1)


def test_reward_that_fails_on_one_rank_stops_both(runs, notes):
    assert [rank["status"] for rank in notes["reward fails"]] == [1, 1]
    assert (runs / "reward fails" / "checkpoint-0" / "state.json").exists()
    assert "error: step 1: the reward" in json.loads((runs / "said.json").read_text())[1]


def test_full_disk_stops_both_ranks(runs, notes):
    assert [rank["status"] for rank in notes["disk is full"]] == [1, 1]
    assert not [*(runs / "disk is full").glob("*checkpoint*")]
    assert "cannot be written" in json.loads((runs / "said.json").read_text())[0]
