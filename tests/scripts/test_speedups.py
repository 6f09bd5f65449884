"""Every means of speed against the plain way: the same branches are chosen, and the same is learned up to rounding."""

from contextlib import contextmanager, nullcontext

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
    from sharpening.running import optimization

    make = optimization.make_adam
    monkeypatch.setattr(
        optimization, "make_adam", lambda *args, scaled, **options: make(*args, scaled=True, **options)
    )


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


LATE_REWARD = """
def late(images, prompts):
    return lambda: (images * images.new_tensor([3, 2, 1]).view(3, 1, 1)).mean((1, 2, 3))
"""


def test_means_are_in_use():
    """Where a GradScaler skips steps, accelerate must see which: the fused optimizer would hide it."""
    from sharpening import model_source, sdxl
    from sharpening.running.optimization import make_adam

    for scaled in (False, True):
        optimizer = make_adam([torch.nn.Parameter(torch.zeros(2))], eight_bit=False, scaled=scaled, lr=1e-3)
        assert optimizer.defaults["fused"] == (not scaled)
    source = model_source.Source("pretrained_model_name_or_path", str(ROOT / "tiny_world" / "sdxl"))
    vae = sdxl.load_decoder(source, "vae", torch.device("cpu"), torch.float32)
    kernels = [weight for weight in vae.parameters() if weight.ndim == 4 and min(weight.shape[1:]) > 1]
    assert kernels and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("scaler", [None, "a GradScaler"])
def test_optimizer_is_told_of_a_scaler(scaler, train, flags, monkeypatch):
    from accelerate import Accelerator

    from sharpening.running import optimization

    told = []

    def record(*args, scaled, **options):
        told.append(scaled)
        raise UserError("enough")

    monkeypatch.setattr(optimization, "make_adam", record)
    make = Accelerator.__init__

    def initialise(self, *args, **options):
        make(self, *args, **options)
        self.scaler = scaler

    monkeypatch.setattr(Accelerator, "__init__", initialise)
    assert train(flags()) == 2
    assert told == [scaler is not None]


SLICES = {"score_batch_size": 1, "decode_batch_size": 1, "train_rows": 1, "generation_batch_size": 1}


@pytest.fixture
def same_choices(method, train, flags, tmp_path, forwards):
    """Check that two runs train on the same states, up to rounding, and learn the same from them."""

    def trained_on(name, options):
        forwards.clear()
        assert train(flags(**{**RUN, **options}, output_dir=tmp_path / name)) == 0
        states = [forward for forward in forwards if forward.gradient]
        return torch.cat([forward.x for forward in states]), torch.cat([forward.t for forward in states])

    def check(options, plain_options, turned_off):
        fast, fast_t = trained_on("fast", options)
        with turned_off:
            plain, plain_t = trained_on("plain", plain_options)
        # Another branch has another noise, whose distance would be that of two normal numbers.
        assert torch.equal(fast_t, plain_t) and (fast - plain).abs().max() < 0.05
        for ours, theirs in zip(metrics(tmp_path / "fast"), metrics(tmp_path / "plain"), strict=True):
            for name in ("reward/best", "reward/worst", "reward/mean"):
                assert ours[name] == pytest.approx(theirs[name], abs=REWARD_TOLERANCE)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS_TOLERANCE)

    return check


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    "turn_off", [without_channels_last, without_fused_optimizer, without_overlap, without_joint_guidance]
)
def test_same_branches_are_chosen_without_it(turn_off, same_choices, tmp_path, monkeypatch):
    options = {}
    if turn_off is without_joint_guidance:
        options["branch_guidance_scale"] = 3
    if turn_off is without_overlap:
        (tmp_path / "mine.py").write_text(LATE_REWARD)
        options["reward_model"] = f"{tmp_path}/mine.py:late"

    @contextmanager
    def turned_off():
        with monkeypatch.context() as patched:
            turn_off(patched)
            yield

    same_choices(options, options, turned_off())


@pytest.mark.usefixtures("no_result")
def test_same_branches_are_chosen_one_by_one(same_choices, method):
    """Every branch is walked, every estimate decoded and every state trained on by itself."""
    slices = {name: size for name, size in SLICES.items() if method == "RLHF" or name != "generation_batch_size"}
    same_choices({}, slices, nullcontext())
