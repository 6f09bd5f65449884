"""What an update costs is what its method needs."""

import pytest

from study import tasks
from study.cost import (
    BEST_OF_N,
    D3PO,
    DDPO,
    DPO,
    MODEL,
    RLHF,
    ROOT,
    SFT,
    compute_before,
    compute_per_update,
    words,
)
from study.settings import DRAWN, EFFICIENT, PAIRS, PAIRS_OF_PATHS, PATHS, SAMPLES
from tests.support.runs import metrics
from tiny_world.shapes import study_captions

DECODE = 0.62  # what decoding costs, in forwards of a row


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
        (RLHF, EFFICIENT, 8 * (5 + DECODE) / 4 + 2 + 2 * 3),
        (BEST_OF_N, DRAWN, 4 * (5 + DECODE) + 3),
        (DPO, {**PAIRS, "sets": 2}, 2 + 2 * 3),
        (DDPO, PATHS, 4 * (5 + DECODE) + 4 * 4 * 3),
        (D3PO, PAIRS_OF_PATHS, 4 * (5 + DECODE) + 2 * 4 + 2 * 4 * 3),
    ],
    ids=[
        "branches",
        "one noise",
        "pairs of paths",
        "pairs of paths at once",
        "pairs",
        "efficient",
        "best",
        "fixed pairs",
        "policy",
        "pairs of stochastic paths",
    ],
)
def test_compute_is_what_the_method_needs(script, changes, per_prompt, folder):
    flags = {"pretrained_model_name_or_path": MODEL, "reward_model": "shapes", "train_batch_size": 5}
    flags |= {"train_data_dir": "tests"} if script == SFT else {"prompts_file": folder / "study_prompts.txt"}
    flags |= changes
    assert compute_per_update(script, flags, DECODE) == pytest.approx(5 * per_prompt)
    before = len(study_captions()) * 2 * 4 * (5 + DECODE) if "sets" in changes else 0
    assert compute_before(script, flags, DECODE) == pytest.approx(before)


@pytest.mark.slow
@pytest.mark.parametrize("script", [SFT, RLHF, BEST_OF_N, DPO, DDPO, D3PO])
def test_a_run_needs_what_was_planned(script, folder, tmp_path):
    """Planned from flags, against what hooks saw of a run of the script itself."""
    flags = {"pretrained_model_name_or_path": ROOT / MODEL, "reward_model": "shapes", "resolution": 32, "seed": 0}
    flags |= {"train_batch_size": 2, "max_train_steps": 2, "report_to": "none", "infer_steps": 5}
    flags |= {"train_data_dir": folder / "shapes"} if script == SFT else {"prompts_file": folder / "study_prompts.txt"}
    flags |= {"sets": 1} if script == DPO else {}
    # Branches that end below t = 0 cost less than planned.
    flags |= {} if script in (DDPO, D3PO) else {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 1e12}
    flags |= {} if script in (DDPO, D3PO) else {"timestep_bias_begin": 700}
    command = words({**flags, "output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"})
    tasks.execute([f"{script}.py", *command], tmp_path / "log.txt")
    last = metrics(tmp_path / "run")[-1]
    counted = last["cost/forwards"] + DECODE * last["cost/images_judged"]
    planned = 2 * compute_per_update(script, flags, DECODE)
    if script == DPO:  # of 4 prompts alone, the others are never met
        planned += compute_before(script, flags, DECODE) * 4 / len(study_captions())
    assert counted == pytest.approx(planned, rel=1e-6)
