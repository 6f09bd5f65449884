"""What an update costs is what its method needs."""

import pytest

from study.cost import BEST_OF_N, D3PO, DDPO, DPO, MODEL, RLHF, SFT, compute_before, compute_per_update
from study.settings import DRAWN, PAIRS, PAIRS_OF_PATHS, PATHS, SAMPLES
from tiny_world.shapes import training_captions

DECODE = 0.62


@pytest.mark.parametrize(
    ("script", "changes", "per_prompt"),
    [
        (SFT, {"num_noisy_latents": 2, "trajectory_nums": 3}, 2 * 3 * (1 + DECODE) + 3 * 3),
        (SFT, {"num_noisy_latents": 1, "trajectory_nums": 1}, 3),  # standard fine-tuning scores nothing
        (RLHF, {**SAMPLES, "trajectory_nums": 2, "train_rows": 3}, 4 * (10 + DECODE) + 2 * (2 + 2 + 2 * 3)),
        # Where a pair's states fit one slice, the walk ends at the last of them.
        (RLHF, {**SAMPLES, "trajectory_nums": 2, "train_rows": 4}, 4 * (10 + DECODE) + 2 + 2 * (2 + 2 * 3)),
        # With m = 1 the gradient's own forward tells the errors of the pair.
        (RLHF, SAMPLES, 4 * (10 + DECODE) + 2 + 2 * 3),
        (BEST_OF_N, DRAWN, 4 * (10 + DECODE) + 3),
        (DPO, {**PAIRS, "sets": 2}, 2 + 2 * 3),
        (DDPO, PATHS, 4 * (10 + DECODE) + 4 * 4 * 3),
        (D3PO, PAIRS_OF_PATHS, 4 * (5 + DECODE) + 2 * 4 + 2 * 4 * 3),
    ],
    ids=[
        "branches",
        "one noise",
        "pairs of paths",
        "pairs of paths at once",
        "pairs",
        "best",
        "fixed pairs",
        "policy",
        "pairs of stochastic paths",
    ],
)
def test_compute_is_what_the_method_needs(script, changes, per_prompt):
    flags = {"pretrained_model_name_or_path": MODEL, "reward_model": "shapes", "train_batch_size": 5}
    flags |= {"train_data_dir": "tests", **changes}
    assert compute_per_update(script, flags, DECODE) == pytest.approx(5 * per_prompt)
    before = len(training_captions()) * 2 * 4 * (10 + DECODE) if "sets" in changes else 0
    assert compute_before(script, flags, DECODE) == pytest.approx(before)
