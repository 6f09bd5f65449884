"""What a run says it cost so far, and where the seconds of a step went."""

import json
import shutil

import pytest

from sharpening.running.cost import COUNTED, PHASES
from tests.support.hooks import OFF_GRID
from tests.support.runs import metrics

VALIDATES = {
    "validation_prompt": "a red circle on a white background", "validation_steps": 1, "validation_epochs": 0,
}  # fmt: skip
ROWS = {f"cost/{name}" for name in COUNTED} | {"cost/forwards"}


@pytest.fixture(params=["SFT", "RLHF"])
def method(request):
    return request.param


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_lora": True, "gradient_checkpointing": True, "branch_guidance_scale": 2, "train_rows": 1}],
    ids=["plain", "recomputed"],
)
def test_cost_is_what_passed_through_the_models(changes, train, flags, forwards, decodes, tmp_path):
    """Blocks that are recomputed are no forward, and both UNets count: the reference is one of them."""
    assert train(flags(**OFF_GRID, **changes, max_train_steps=2)) == 0
    trained = sum(len(forward.x) for forward in forwards if forward.gradient)
    others = sum(len(forward.x) for forward in forwards if not forward.gradient)
    first, last = metrics(tmp_path / "run")
    assert last["cost/rows_trained"] == trained > 0 and last["cost/rows_without_gradient"] == others > 0
    assert last["cost/forwards"] == others + 3 * trained
    assert last["cost/images_judged"] == sum(decodes) > 0
    for name in ROWS:  # off the grid, all steps cost the same
        assert last[name] == 2 * first[name]


@pytest.mark.usefixtures("no_result")
def test_validation_is_not_part_of_the_cost_and_phases_make_up_a_step(train, flags, tmp_path):
    assert train(flags(output_dir=tmp_path / "without")) == 0
    assert train(flags(**VALIDATES, output_dir=tmp_path / "with")) == 0
    pairs = zip(metrics(tmp_path / "without"), metrics(tmp_path / "with"), strict=True)
    for without, validated in pairs:
        assert {name: without[name] for name in ROWS} == {name: validated[name] for name in ROWS}
        assert without["time/validation"] == 0 < validated["time/validation"]
        for line in (without, validated):
            phases = sum(line[f"time/{name}"] for name in (*PHASES, "other"))
            assert phases == pytest.approx(line["time/step"] + line["time/validation"])
            assert line["time/score"] > 0 < line["time/train"]
    lines = metrics(tmp_path / "with")
    assert lines[-1]["cost/seconds"] == pytest.approx(sum(line["time/step"] for line in lines))


@pytest.mark.usefixtures("no_result")
def test_cost_goes_on_where_the_checkpoint_was(train, flags, tmp_path):
    options = {"max_train_steps": 3, "checkpointing_steps": 2}
    assert train(flags(**options, output_dir=tmp_path / "whole")) == 0
    resumed, checkpoint = tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2"
    shutil.copytree(checkpoint, resumed / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", resumed)
    assert train(flags(**options, output_dir=resumed, resume_from_checkpoint="latest")) == 0
    whole, again = metrics(tmp_path / "whole"), metrics(resumed)
    for line, other in zip(whole, again, strict=True):
        assert {name: line[name] for name in ROWS} == {name: other[name] for name in ROWS}
    before = json.loads((checkpoint / "state.json").read_text())["cost"]["seconds"]
    assert before == again[1]["cost/seconds"] < again[2]["cost/seconds"]
