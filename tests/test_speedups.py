"""Every means of speed against the plain way: the same branches are chosen, and the same is learned up to rounding."""

import pytest
import torch
from conftest import ROOT, metrics

REWARD_TOLERANCE, LOSS_TOLERANCE = 5e-4, 1e-3  # of rewards in [0, 1]; relative, after the updates before
RUN = {
    "pretrained_model_name_or_path": ROOT / "scripts" / "tiny_sdxl", "max_train_steps": 2, "learning_rate": 1e-3,
    "train_batch_size": 4, "infer_steps": 5,
}  # fmt: skip


@pytest.fixture(params=["SFT", "RLHF"])
def method(request):
    return request.param


def without_channels_last(monkeypatch):
    monkeypatch.setattr("sharpening.sdxl.channels_last", lambda model: model)


def without_fused_optimizer(monkeypatch):
    from sharpening import run

    make = run.make_optimizer
    monkeypatch.setattr(run, "make_optimizer", lambda *args, scaled: make(*args, scaled=True))


def without_overlap(monkeypatch):
    """Every reward is waited for before the next step is walked."""
    from sharpening.scoring import Reward

    begin = Reward.begin

    def at_once(self, images, prompts):
        verdict = begin(self, images, prompts)()
        return lambda: verdict

    monkeypatch.setattr(Reward, "begin", at_once)


def without_slices(monkeypatch):
    """Every branch is walked, and every estimate decoded, by itself."""
    from sharpening import sdxl, trajectory

    score, decode = trajectory.score_branches, sdxl.decode_latents
    monkeypatch.setattr(trajectory, "score_branches", lambda *args, **options: score(*args[:6], 1, **options))
    monkeypatch.setattr(sdxl, "decode_latents", lambda vae, latents, batch_size: decode(vae, latents, 1))


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("turn_off", [without_channels_last, without_fused_optimizer, without_overlap, without_slices])
def test_same_branches_are_chosen_without_it(turn_off, train, flags, tmp_path, monkeypatch):
    from sharpening import trajectory

    choices, select = [], trajectory.select

    def record(rewards, active):
        choices.append(select(rewards, active))
        return choices[-1]

    monkeypatch.setattr(trajectory, "select", record)
    assert train(flags(**RUN, output_dir=tmp_path / "fast")) == 0
    fast = [*choices]
    choices.clear()
    with monkeypatch.context() as patched:
        turn_off(patched)
        assert train(flags(**RUN, output_dir=tmp_path / "plain")) == 0
    assert len(fast) == len(choices) == 2
    for ours, plain in zip(fast, choices, strict=True):
        assert torch.equal(ours.best, plain.best) and torch.equal(ours.worst, plain.worst)
        torch.testing.assert_close(ours.branch_reward, plain.branch_reward, rtol=0, atol=REWARD_TOLERANCE)
    ours, plain = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("fast", "plain"))
    assert ours == pytest.approx(plain, rel=LOSS_TOLERANCE)
