"""Warnings about a run that is learning nothing: they come once, and only when due."""

import logging

import pytest
import torch
from diffusers import UNet2DConditionModel

from sharpening.running.watch import Watch
from tests.support.runs import metrics

QUICK = {"infer_steps": 2, "trajectory_nums": 1, "num_noisy_latents": 2}


@pytest.fixture
def method():
    return "RLHF"


def constant_reward(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\n\ndef flat(images, prompts):\n    return torch.ones(len(prompts))\n"
    )
    return f"{tmp_path}/mine.py:flat"


def test_flat_reward_teaches_nothing_and_is_pointed_out_once(train, flags, world, tmp_path, caplog):
    options = {**QUICK, "reward_model": constant_reward(tmp_path), "train_batch_size": 1, "adam_weight_decay": 0}
    assert train(flags(**options, max_train_steps=25)) == 0
    lines = metrics(tmp_path / "run")
    assert all(line["grad_norm"] == 0 and line["reward/tie_rate"] == 1 and "loss" not in line for line in lines)
    base = UNet2DConditionModel.from_pretrained(world.model, subfolder="unet")
    trained = UNet2DConditionModel.from_pretrained(tmp_path / "run", subfolder="unet")
    assert all(map(torch.equal, base.parameters(), trained.parameters()))
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("no two branches of a prompt earned different rewards" in message for message in messages) == 1
    assert sum("no parameter changed in 20 steps" in message for message in messages) == 1


def watch_over(lines, moving=True, rows=10):
    parameters = [torch.zeros(3)]
    watch = Watch(rows, parameters)
    for line in lines:
        parameters[0] += moving
        watch.check(line, parameters)


@pytest.mark.parametrize(
    ("lines", "moving", "said"),
    [
        ([{"preference/accuracy": 0.5}] * 300, True, ["in 0.500 of 2000 pairs"]),
        ([{"preference/accuracy": 0.5}] * 199, True, []),
        ([{"preference/accuracy": 0.5, "reward/tie_rate": 0.5}] * 399, True, []),
        ([{"preference/accuracy": 0.5}] * 50 + [{"preference/accuracy": 0.55}] * 1000, True, []),
        ([{"reward/tie_rate": 1.0}] * 19 + [{"reward/tie_rate": 0.9}] + [{"reward/tie_rate": 1.0}] * 19, True, []),
        ([{"reward/tie_rate": 1.0}] * 80, True, ["no two branches"]),
        (
            ([{"reward/tie_rate": 1.0}] * 20 + [{"reward/tie_rate": 0.0}]) * 4, True, ["no two branches"],
        ),
        ([{}] * 60, False, ["no parameter changed in 20 steps"]),
    ],
)  # fmt: skip
def test_warnings_come_once_and_only_when_due(lines, moving, said, caplog):
    watch_over(lines, moving)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(said)
    assert all(part in message for part, message in zip(said, messages, strict=True))


@pytest.mark.parametrize(("rows", "accuracy"), [(1, 0.6), (4, 0.57), (24, 0.57)])
def test_healthy_accuracy_is_not_taken_for_a_coin(rows, accuracy, caplog):
    """Accuracies as they come: shares of few pairs. Of 40 such runs none may be warned of."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        hits = (torch.rand(2100 // rows, rows, generator=generator) < accuracy).double().mean(1).tolist()
        watch_over([{"preference/accuracy": share} for share in hits], rows=rows)
    assert caplog.records == []
