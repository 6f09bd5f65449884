"""Every means of speed against the plain way: the same branches are chosen, and the same is learned up to rounding."""

from types import SimpleNamespace

import pytest
import torch

from sharpening.errors import UserError
from tests.support.runs import ROOT, metrics

REWARD_TOLERANCE, LOSS_TOLERANCE = 5e-4, 1e-3  # of rewards in [0, 1]; relative, after the updates before
RUN = {
    "pretrained_model_name_or_path": ROOT / "tiny_world" / "sdxl", "max_train_steps": 2, "learning_rate": 1e-3,
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
    from sharpening.rewards.calling import Reward

    begin = Reward.begin

    def at_once(self, images, prompts):
        verdict = begin(self, images, prompts)()
        return lambda: verdict

    monkeypatch.setattr(Reward, "begin", at_once)


def without_joint_guidance(monkeypatch):
    """Conditional and unconditional outputs come from forwards of their own."""
    from sharpening import sdxl

    def predict(self, x, t):
        return sdxl.predict_output(self.unet, x, t, self.condition)

    monkeypatch.setattr(sdxl.GuidedUNet, "predict", predict)


def without_slices(monkeypatch):
    """Every branch is walked, and every estimate decoded, by itself."""
    from sharpening import sdxl, trajectory

    score, decode = trajectory.score_branches, sdxl.decode_latents
    monkeypatch.setattr(trajectory, "score_branches", lambda *args, **options: score(*args[:6], 1, **options))
    monkeypatch.setattr(sdxl, "decode_latents", lambda vae, latents, batch_size: decode(vae, latents, 1))


LATE_REWARD = """
def late(images, prompts):
    return lambda: (images * images.new_tensor([3, 2, 1]).view(3, 1, 1)).mean((1, 2, 3))
"""


def test_means_are_in_use(tmp_path):
    """Where a GradScaler skips steps, accelerate must see which: the fused optimizer would hide it."""
    from sharpening import model_source, run, sdxl

    parameters = [torch.nn.Parameter(torch.zeros(2))]
    args = SimpleNamespace(
        learning_rate=1e-3, scale_lr=False, use_8bit_adam=False, adam_beta1=0.9, adam_beta2=0.999,
        adam_weight_decay=0.0, adam_epsilon=1e-8, pretrained_vae_model_name_or_path=None,
    )  # fmt: skip
    for scaled in (False, True):
        assert run.make_optimizer(parameters, args, 1, scaled=scaled).defaults["fused"] == (not scaled)
    source = model_source.Source("pretrained_model_name_or_path", str(ROOT / "tiny_world" / "sdxl"))
    vae = sdxl.load_vae(args, source, torch.device("cpu"), torch.float32)
    kernels = [weight for weight in vae.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
    assert kernels and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("scaler", [None, "a GradScaler"])
def test_optimizer_is_told_of_a_scaler(scaler, train, flags, monkeypatch):
    from accelerate import Accelerator

    from sharpening import run

    told = []

    def record(*args, scaled):
        told.append(scaled)
        raise UserError("enough")

    monkeypatch.setattr(run, "make_optimizer", record)
    make = Accelerator.__init__

    def initialise(self, *args, **options):
        make(self, *args, **options)
        self.scaler = scaler

    monkeypatch.setattr(Accelerator, "__init__", initialise)
    assert train(flags()) == 2
    assert told == [scaler is not None]


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    "turn_off",
    [without_channels_last, without_fused_optimizer, without_overlap, without_joint_guidance, without_slices],
)
def test_same_branches_are_chosen_without_it(turn_off, train, flags, tmp_path, monkeypatch):
    from sharpening import trajectory

    choices, select = [], trajectory.select

    def record(rewards, active):
        choices.append(select(rewards, active))
        return choices[-1]

    monkeypatch.setattr(trajectory, "select", record)
    options = dict(RUN)
    if turn_off is without_joint_guidance:
        options["branch_guidance_scale"] = 3
    if turn_off is without_overlap:
        (tmp_path / "mine.py").write_text(LATE_REWARD)
        options["reward_model"] = f"{tmp_path}/mine.py:late"
    assert train(flags(**options, output_dir=tmp_path / "fast")) == 0
    fast = [*choices]
    choices.clear()
    with monkeypatch.context() as patched:
        turn_off(patched)
        assert train(flags(**options, output_dir=tmp_path / "plain")) == 0
    assert len(fast) == len(choices) == 2
    for ours, plain in zip(fast, choices, strict=True):
        assert torch.equal(ours.best, plain.best) and torch.equal(ours.worst, plain.worst)
        torch.testing.assert_close(ours.branch_reward, plain.branch_reward, rtol=0, atol=REWARD_TOLERANCE)
    ours, plain = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("fast", "plain"))
    assert ours == pytest.approx(plain, rel=LOSS_TOLERANCE)
