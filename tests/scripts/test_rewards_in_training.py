"""The SFT script with each reward of the catalogue, on tiny random checkpoints of the right architecture."""

import pytest
import torch
from safetensors.torch import load_file

from mllm_template import load_template
from reward import CATALOGUE
from tests.support.captioned_files import image_folder
from tests.support.runs import metrics
from tests.support.tiny_rewards import TINY, write_image_reward
from tiny_world.grader_server import Action, grades

RELATED = ["a cat sat next to a dog", "a house stood near a river", "a bird sits on top of a tree"]
SMALL = {"train_batch_size": 1, "num_noisy_latents": 2, "trajectory_nums": 2, "max_train_steps": 2}


@pytest.fixture
def spatial_options(tiny_clip, tiny_blip_vqa, tiny_grounding_dino, tmp_path):
    """Flags that run t2i_spatial and t2i_complex here, on captions that both can score."""
    shared = {"detector": tiny_grounding_dino, "train_data_dir": image_folder(tmp_path / "related", RELATED)}
    models = {"t2i_complex_blip_vqa": tiny_blip_vqa, "t2i_complex_clip": f"{TINY}/{tiny_clip[0]}"}
    return {
        "t2i_spatial": {"reward_model": "t2i_spatial", **shared},
        "t2i_complex": {"reward_model": "t2i_complex", **shared, **models},
    }


@pytest.fixture
def options(
    tiny_clip, aesthetic_head, tiny_pickscore, tiny_image_reward, tiny_blip_vqa, spatial_options, tmp_path, server
):
    """Flags that run each entry here: without the internet, against the local grader."""
    clip = f"{TINY}/{tiny_clip[0]}"
    folder = tmp_path / "reward_models"
    for variant, name in enumerate(("attribute", "spatial", "non_spatial")):
        write_image_reward(folder / name, variant)
    return {
        "clip": {"reward_model": "clip", "clip_model": clip},
        "image_reward": {"reward_model": f"image_reward:{tiny_image_reward}"},
        "compositional": {
            "reward_model": "compositional",
            "compositional_models": folder,
            "compositional_weights": "1,0.5,0.5",
        },
        "mllm": {"reward_model": "mllm", "base_url": server.base_url, "cache_dir": tmp_path / "cache"},
        "pickscore": {"reward_model": f"pickscore:{tiny_pickscore}"},
        "hpsv2": {"reward_model": f"hpsv2:{TINY}={tiny_clip[0]}"},
        "aesthetic": {"reward_model": f"aesthetic:{aesthetic_head}", "aesthetic_clip": clip},
        "blip_vqa": {"reward_model": f"blip_vqa:{tiny_blip_vqa}"},
        "clip_non_spatial": {"reward_model": f"clip_non_spatial:{clip}"},
        **spatial_options,
        "ocr": {
            "reward_model": "ocr",
            "train_data_dir": image_folder(tmp_path / "signs", [f'a sign that says "{text}"' for text in "AB"]),
        },
        "jpeg_compressibility": {"reward_model": "jpeg_compressibility"},
        "shapes": {"reward_model": "shapes"},
    }


PARTS = {
    "compositional": ["attribute", "spatial", "non_spatial"],
    "mllm": load_template("five_aspects").aspects,
    "t2i_complex": ["blip_vqa", "spatial", "clip"],
}


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("name", CATALOGUE)
def test_training_with(name, options, train, flags, tmp_path):
    assert train(flags(**SMALL, **options[name])) == 0
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2
    for line in lines:
        assert line[f"reward/component/{name}"] == pytest.approx(line["reward/mean"], rel=1e-4, abs=1e-5)
        assert line["reward/failure_rate"] == 0
        for part in PARTS.get(name, []):
            assert f"reward/component/{name}/{part}" in line


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("method", ["SFT", "RLHF"])
def test_training_with_grades_of_one_number(method, options, train, flags, tmp_path, server):
    server.default = Action("It shows what it should.\nFinal Score: 4")
    changes = {**SMALL, **options["mllm"], "max_train_steps": 1, "mllm_template": "final_score"}
    assert train(flags(**changes)) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["reward/mean"] == line["reward/component/mllm"] == pytest.approx(0.75)  # 4 on the scale of 1 to 5


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("method", ["RLHF"])
@pytest.mark.parametrize("name", ["t2i_spatial", "t2i_complex"])
def test_rlhf_with(name, spatial_options, train, flags, tmp_path):
    changes = {**SMALL, **spatial_options[name], "train_data_dir": None, "prompts_file": tmp_path / "prompts.txt"}
    changes["prompts_file"].write_text("\n".join(RELATED))
    assert train(flags(**changes)) == 0
    for line in metrics(tmp_path / "run"):
        assert line[f"reward/component/{name}"] == pytest.approx(line["reward/mean"], rel=1e-4, abs=1e-5)
        assert line["reward/failure_rate"] == 0


@pytest.mark.usefixtures("no_result")
def test_prompt_that_t2i_spatial_cannot_score_stops_the_run_and_is_named(
    spatial_options, train, flags, tmp_path, capsys
):
    changes = {**SMALL, **spatial_options["t2i_spatial"]}
    changes["train_data_dir"] = image_folder(tmp_path / "other", ["a cat and a dog"])
    assert train(flags(**changes)) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "the reward t2i_spatial needs two things" in error and "'a cat and a dog'" in error
    assert train(flags(**changes, reward_failure="skip", output_dir=tmp_path / "skipped")) == 0
    assert [line["reward/failure_rate"] for line in metrics(tmp_path / "skipped")] == [1, 1]


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("method", ["RLHF"])
def test_rlhf_with_ocr(method, train, flags, tmp_path):
    """From prompts alone; prompts without quotes leave the selection."""
    (tmp_path / "prompts.txt").write_text('a sign that says "OPEN"\na dog\n')
    changes = {"train_data_dir": None, "prompts_file": tmp_path / "prompts.txt", "trajectory_nums": 1}
    changes |= {"num_noisy_latents": 2, "max_train_steps": 1, "reward_failure": "skip"}
    assert train(flags(**changes, reward_model="ocr")) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["reward/failure_rate"] == 0.5
    assert line["reward/component/ocr"] == pytest.approx(line["reward/mean"])


@pytest.mark.usefixtures("no_result")
def test_training_with_a_weighted_sum_of_four(options, train, flags, tmp_path):
    names = ["clip", "image_reward", "mllm", "shapes"]
    changes = {flag: value for name in names for flag, value in options[name].items()}
    weights = {"clip": 0.01, "image_reward": 1.0, "mllm": -2.0, "shapes": 0.5}
    changes["reward_model"] = ",".join(f"{options[name]['reward_model']}:{weights[name]}" for name in names)
    assert train(flags(**SMALL, **changes)) == 0
    for line in metrics(tmp_path / "run"):
        total = sum(weight * line[f"reward/component/{name}"] for name, weight in weights.items())
        assert line["reward/mean"] == pytest.approx(total, rel=1e-4)


@pytest.mark.usefixtures("no_result")
def test_grades_decide_which_branch_is_trained_on(options, train, flags, tmp_path, server, forwards):
    """The grader prefers whichever image it sees second; with one step per branch that is the second branch."""
    server.plan = {caption: [Action(grades(1)), Action(grades(9))] for caption in every_caption()}
    small = {**SMALL, "trajectory_nums": 1, "mllm_concurrency": 1, "max_train_steps": 1}
    assert train(flags(**small, **options["mllm"])) == 0
    (line,) = metrics(tmp_path / "run")
    assert (line["reward/best"], line["reward/worst"]) == (pytest.approx(0.9), pytest.approx(0.1))
    scored, trained_on = forwards
    assert torch.equal(trained_on.x, scored.x[1:]) and not torch.equal(trained_on.x, scored.x[:1])


def every_caption():
    from tiny_world.shapes import HELD_OUT, training_captions

    return [*training_captions(), *HELD_OUT]


@pytest.mark.usefixtures("no_result")
def test_skipped_branches_are_counted_and_the_others_train(options, train, flags, tmp_path, server):
    refusal = Action(None, refusal="no")
    server.plan = {caption: [refusal, Action(grades(6))] for caption in every_caption()}
    changes = {**SMALL, "num_noisy_latents": 3, "trajectory_nums": 1, "max_train_steps": 1, "train_batch_size": 2}
    changes |= {**options["mllm"], "reward_failure": "skip", "mllm_concurrency": 1}
    assert train(flags(**changes)) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["reward/failure_rate"] == pytest.approx(1 / 3)
    assert line["reward/mean"] == line["reward/worst"] == pytest.approx(0.6)
    assert line["reward/spread"] == 0 and line["loss"] > 0 and line["grad_norm"] > 0


def test_step_without_any_score_changes_no_weight(options, train, flags, tmp_path, server, world):
    server.default = Action(None, refusal="no")
    changes = {**SMALL, **options["mllm"], "reward_failure": "skip", "adam_weight_decay": 0}
    prompt = "a red circle on a white background"
    assert train(flags(**changes, validation_prompt=prompt, validation_steps=1)) == 0
    for line in metrics(tmp_path / "run"):
        assert line["reward/failure_rate"] == 1 and line["grad_norm"] == 0
        assert not {"loss", "reward/mean", "reward/best", "validation/reward"} & line.keys()
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(world.model / file), load_file(tmp_path / "run" / file)
    assert all((before[name] == after[name]).all() for name in before)


def test_failure_stops_the_run_unless_told_to_skip(options, train, flags, tmp_path, server, capsys):
    server.default = Action(None, refusal="not this one")
    assert train(flags(**SMALL, **options["mllm"])) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "step 1: the reward mllm" in error and "refused: not this one" in error
    assert (tmp_path / "run" / "checkpoint-0").is_dir()


@pytest.mark.usefixtures("no_result")
def test_cap_on_calls_stops_the_run_after_a_checkpoint_and_resuming_pays_only_for_the_rest(
    options, train, flags, tmp_path, server, capsys
):
    changes = {**SMALL, **options["mllm"], "num_noisy_latents": 2, "trajectory_nums": 1, "max_train_steps": 3}
    assert train(flags(**changes, mllm_max_calls=3)) == 1
    assert "--mllm_max_calls=3 requests are spent" in capsys.readouterr().err
    assert len(server.requests) == 3
    assert train(flags(**changes, mllm_max_calls=3, resume_from_checkpoint="latest")) == 0
    assert len(server.requests) == 6
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
