"""What a device is asked to do in a step: few forwards however it is accumulated, few conversions of the weights."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sharpening.run import Run
from tests.support.hooks import OFF_GRID

LETTER = {"latents_per_prompt": "1"}
SAMPLES = {"reward_on": "sample", "latents_per_prompt": "n", "trajectory_nums": 2}
pytestmark = pytest.mark.usefixtures("no_result")


@pytest.fixture(params=["SFT", "RLHF"])
def method(request):
    return request.param


class Casts(TorchDispatchMode):
    """Counts, by address, the conversions of tensors to bfloat16."""

    def __init__(self):
        super().__init__()
        self.addresses = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.addresses[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def conversions(monkeypatch):
    """How often each weight of the UNet was converted in the steps of a run."""
    counts, steps_of_run = [], Run.steps

    def steps(run, unet):
        with Casts() as casts:
            yield from steps_of_run(run, unet)
            # A weight lies where it lay: the optimizer works in place.
            counts.extend(casts.addresses[parameter.data_ptr()] for parameter in unet.parameters())

    monkeypatch.setattr(Run, "steps", steps)
    return counts


def test_a_step_costs_the_same_however_it_is_accumulated(method, train, flags, forwards, decodes, tmp_path):
    seen = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        forwards.clear(), decodes.clear()
        options = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_train_steps": 2}
        assert train(flags(**OFF_GRID, **options, output_dir=tmp_path / str(batch))) == 0
        seen.append(([(forward.purpose, len(forward.x)) for forward in forwards], list(decodes)))
    assert seen[0] == seen[1] == seen[2] and len(seen[0][0]) > 0


# A pass is all forwards of a step without gradient for one purpose, or one slice of the train pass.
@pytest.mark.parametrize(
    ("method", "changes", "passes"),
    [
        ("SFT", {}, 2),  # score, train
        ("SFT", {"num_noisy_latents": 1}, 2),  # walk, train
        ("RLHF", LETTER, 3),  # generate, score, train
        ("RLHF", SAMPLES, 3),  # generate, walk, train
    ],
    indirect=["method"],
)
def test_a_pass_converts_the_weights_once(method, changes, passes, train, flags, conversions):
    """Slices are small, so that a pass has many forwards; the train pass, which keeps a gradient, has one."""
    slices = {"score_batch_size": 2, "generation_batch_size": 2, "decode_batch_size": 2, "train_rows": 100}
    if method == "SFT":
        del slices["generation_batch_size"]
    assert train(flags(**OFF_GRID, **slices, **changes, mixed_precision="bf16", max_train_steps=2)) == 0
    # Those of norms stay as they are.
    assert Counter(conversions).keys() == {0, 2 * passes} and sum(map(bool, conversions)) > 50


@pytest.mark.parametrize(
    ("method", "changes"), [("SFT", {}), ("RLHF", LETTER), ("RLHF", SAMPLES)], indirect=["method"]
)
def test_what_a_pass_without_gradient_converted_is_not_what_trains(method, changes, train, flags, gradients, tmp_path):
    """A weight that was converted without gradient and then trained on would have none: the gradient is that of a run
    in which nothing converted is kept."""
    for kept in (True, False):
        torch.set_autocast_cache_enabled(kept)
        try:
            options = {"mixed_precision": "bf16", "max_train_steps": 1, "output_dir": tmp_path / str(kept)}
            assert train(flags(**OFF_GRID, **options, **changes)) == 0
        finally:
            torch.set_autocast_cache_enabled(True)
    assert torch.equal(*gradients) and gradients[0].norm() > 0
