"""What only the RLHF script promises: prompts alone, generation, its cost, the reference, reuse, and its warnings."""

import json
import logging
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import train_rlhf_diffusion_sharpening_sdxl as script
from sharpening import sdxl
from sharpening.draws import draw_branches, timestep_probabilities
from sharpening.running.tracking import Watch
from sharpening.trajectory import Schedule
from tests.support.runs import ROOT, metrics, same_files, same_tensors

CAPTIONS = ["a red circle on a white background", "a blue square on a gray background"]
SAMPLES = {"reward_on": "sample", "latents_per_prompt": "n"}
POLICY = {**SAMPLES, "train_on": "policy", "guidance_scale": 1}
QUICK = {"infer_steps": 2, "trajectory_nums": 1, "num_noisy_latents": 2}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def method():
    return "RLHF"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return path


@pytest.fixture
def counted(monkeypatch):
    """Rows that pass through the UNet by purpose and through the decoder, as the script runs them."""
    rows = dict.fromkeys(("generate", "score", "reference", "train", "decode"), 0)
    frozen, generating = [], []
    predict, decode, load = sdxl.predict_output, sdxl.decode_latents, sdxl.load_frozen_unet
    from sharpening import trajectory

    def count_predict(unet, x, t, condition):
        if generating:
            purpose = "generate"
        elif any(unet is reference for reference in frozen) or adapter_is_off(unet):
            purpose = "reference"
        else:
            purpose = "train" if unet.training else "score"
        assert torch.is_grad_enabled() == (purpose == "train" and not in_guide(condition)), purpose
        rows[purpose] += len(x)
        return predict(unet, x, t, condition)

    def in_guide(condition):
        return condition.embeds.abs().max() == 0  # the unconditional part of guidance has no gradient

    def count_decode(vae, latents, batch_size):
        rows["decode"] += len(latents)
        return decode(vae, latents, batch_size)

    def load_frozen(*args):
        frozen.append(load(*args))
        return frozen[-1]

    def counted_generation(function):
        def count(*args):
            generating.append(True)
            result = function(*args)
            generating.pop()
            return result

        return count

    monkeypatch.setattr(sdxl, "predict_output", count_predict)
    monkeypatch.setattr(sdxl, "decode_latents", count_decode)
    monkeypatch.setattr(sdxl, "load_frozen_unet", load_frozen)
    for name in ("generate", "sample_path"):
        monkeypatch.setattr(trajectory, name, counted_generation(getattr(trajectory, name)))
    return rows


def adapter_is_off(unet):
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(module.disable_adapters for module in unet.modules() if isinstance(module, BaseTunerLayer))


LATE = {"timestep_bias_strategy": "range", "timestep_bias_begin": 500, "timestep_bias_multiplier": 1e12}


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_noisy_latents": 4, "trajectory_nums": 2, "gradient_accumulation_steps": 2},
        {"branch_guidance_scale": 2, "guidance_scale": 1},
        {"latents_per_prompt": "n", "share_noise_in_pair": True},
        {**SAMPLES, "trajectory_nums": 2},
        {"preset": "released"},
        {"generation_reuse": 2},
        {**SAMPLES, "generation_reuse": 2, "trajectory_nums": 1},
        {"use_lora": True},
        {**SAMPLES, "train_on": "best"},
        {**POLICY, "trajectory_nums": 3, "num_noisy_latents": 4, "timestep_bias_strategy": "none"},
    ],
    ids=lambda changes: ",".join(changes) or "defaults",
)
def test_forwards_of_an_optimizer_step_are_those_documented(changes, train, flags, counted, tmp_path, prompts):
    """Only selected pairs see the reference and a gradient; a generation is counted once for all updates it serves."""
    changes = {"prompts_file": prompts, "train_data_dir": None, "infer_steps": 5, **LATE, **changes}
    command = flags(**changes, max_train_steps=2)
    assert train(command) == 0
    expected = dict.fromkeys(counted, 0) | script.rows_per_step(script.parse_args(command))
    assert {name: count / 2 for name, count in counted.items()} == expected


def test_prompts_file_is_all_the_data_a_run_needs(train, flags, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an image was read or encoded")

    monkeypatch.setattr(sdxl, "encode_images", refuse)
    monkeypatch.setattr("sharpening.data.encoding_cache.read_image", refuse)
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([CAPTIONS[0], "", CAPTIONS[1], CAPTIONS[0], "   "]) + "\n")
    assert train(flags(train_data_dir=None, prompts_file=path, **QUICK)) == 0
    plan = {line[:18].strip(): line[20:] for line in capsys.readouterr().out.splitlines()}
    assert plan["data"] == (
        f"2 prompts of {path} (5 read: 2 empty and 1 repeated left out, 0 of several lines joined)"
    )
    assert plan["steps"] == "2, 1 per epoch, 2.00 epochs"


def test_caption_column_of_an_image_folder_is_read_without_its_images(train, flags, world, tmp_path, monkeypatch):
    folder = tmp_path / "shapes"
    shutil.copytree(world.shapes, folder)
    for image in folder.glob("*.png"):
        image.write_bytes(b"no picture")
    assert train(flags(train_data_dir=folder, **QUICK)) == 0


@pytest.mark.usefixtures("no_result")
def test_one_latent_serves_all_branches_or_each_has_its_own(train, flags, tmp_path, monkeypatch):
    seen = []
    add_noise = Schedule.add_noise

    def record(self, x_0, eps, t):
        seen.append((x_0.clone(), eps.clone()))
        return add_noise(self, x_0, eps, t)

    monkeypatch.setattr(Schedule, "add_noise", record)
    from sharpening import draws

    draw_noise, drawn = draws.draw_noise, []
    monkeypatch.setattr(draws, "draw_noise", lambda *args: drawn.append(draw_noise(*args)) or drawn[-1])
    cases = {"one": {}, "own": {"latents_per_prompt": "n"}}
    cases["noise of the generation"] = {"latents_per_prompt": "n", "branch_noise": "generation"}
    cases["shared noise"] = {"latents_per_prompt": "n", "share_noise_in_pair": True}
    alike = {}
    for name, changes in cases.items():
        seen.clear()
        assert train(flags(**QUICK, max_train_steps=1, output_dir=tmp_path / name, **changes)) == 0
        x_0, eps = (part.unflatten(0, (2, 2)) for part in seen[0])
        alike[name] = (torch.equal(x_0[:, 0], x_0[:, 1]), torch.equal(eps[:, 0], eps[:, 1]))
        assert not torch.equal(x_0[0, 0], x_0[1, 0]) and not torch.equal(eps[0, 0], eps[1, 0])
        assert torch.equal(eps, drawn[-1]) == (name == "noise of the generation")
    assert alike == {
        "one": (True, False),
        "own": (False, False),
        "noise of the generation": (False, False),
        "shared noise": (False, True),
    }


@pytest.mark.usefixtures("no_result")
def test_generation_equals_the_pipeline_of_the_current_model(train, flags, world, prompts, monkeypatch):
    """The first generated latents against stock diffusers from the same noise, guidance included."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    from sharpening import draws, trajectory

    noises, results = [], []
    draw, generate = draws.draw_noise, trajectory.generate
    monkeypatch.setattr(draws, "draw_noise", lambda *args: noises.append(draw(*args)) or noises[-1])
    monkeypatch.setattr(trajectory, "generate", lambda *args: results.append(generate(*args)) or results[-1])
    changes = {"prompts_file": prompts, "train_data_dir": None, "generation_batch_size": 1}
    assert train(flags(**changes, max_train_steps=1, infer_steps=4, guidance_scale=3.0)) == 0
    pipeline = StableDiffusionXLPipeline.from_pretrained(world.model)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "height": 32, "width": 32}
    candidates = [pipeline(c, latents=noise, **options).images for noise in noises[0] for c in CAPTIONS]
    for ours in results:  # the draw decides which prompt comes first
        assert min(float((ours - theirs).abs().max()) for theirs in candidates) < 1e-3 * float(ours.abs().max())


@pytest.mark.parametrize(
    "extra",
    [
        {},
        pytest.param(SAMPLES, marks=pytest.mark.slow),
        pytest.param({**SAMPLES, "generate_with": "reference"}, marks=pytest.mark.slow),
        pytest.param({"use_lora": True}, marks=pytest.mark.slow),
    ],
    ids=["trajectory", "sample", "reference", "LoRA"],
)
def test_resume_amid_a_reused_generation_is_exact(extra, train, flags, tmp_path):
    """Step 4 of 6 uses latents that the weights of step 3 made: a checkpoint after step 3 must hold them."""
    options = {
        **QUICK,
        "max_train_steps": 6,
        "generation_reuse": 3,
        "checkpointing_steps": 1,
        "use_ema": True,
        **extra,
    }
    options |= {"gradient_accumulation_steps": 2}
    assert train(flags(**options, output_dir=tmp_path / "whole")) == 0
    for step in (3, 4):
        resumed = tmp_path / f"resumed{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        assert (resumed / f"checkpoint-{step}" / "generated_latents_0.pt").exists() == (step == 4)
        assert train(flags(**options, output_dir=resumed, resume_from_checkpoint="latest")) == 0
        weights = "lora/pytorch_lora_weights.safetensors" if "use_lora" in extra else WEIGHTS
        assert same_tensors(tmp_path / "whole" / "checkpoint-6" / weights, resumed / "checkpoint-6" / weights)
        assert same_files(tmp_path / "whole", resumed, ["checkpoint-6/optimizer.bin"]) == []
        ours, theirs = metrics(tmp_path / "whole")[step:], metrics(resumed)
        assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    "changes", [{"generation_reuse": 4}, {"train_batch_size": 4}, {"max_train_samples": 5}, {"num_noisy_latents": 3}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_latents_of_a_checkpoint_serve_no_other_prompts(changes, train, flags, trained_once, tmp_path, monkeypatch):
    options = {**QUICK, "generation_reuse": 2, "latents_per_prompt": "n", "checkpointing_steps": 3}
    checkpoint = trained_once(**options, max_train_steps=3) / "checkpoint-3"
    shutil.copytree(checkpoint, tmp_path / "run" / checkpoint.name)
    generations = []
    from sharpening import trajectory

    generate = trajectory.generate
    monkeypatch.setattr(trajectory, "generate", lambda *args: generations.append(1) or generate(*args))
    resumed = {**options, **changes, "max_train_steps": 4}
    assert train(flags(**resumed, resume_from_checkpoint="latest")) == 0
    assert generations


@pytest.mark.usefixtures("no_result")
def test_pairs_of_the_reference_are_a_fixed_data_set(train, flags, prompts, monkeypatch):
    """Whatever the model has become, a prompt has the latents that the base made of it, set by set, each made once."""
    from sharpening import trajectory

    made, seen = [], []
    generate, add_noise = trajectory.generate, Schedule.add_noise
    monkeypatch.setattr(trajectory, "generate", lambda *args: made.append(generate(*args)) or made[-1])
    monkeypatch.setattr(Schedule, "add_noise", lambda *args: seen.append(args[1]) or add_noise(*args))
    options = {**SAMPLES, "prompts_file": prompts, "train_data_dir": None, "num_noisy_latents": 2, "infer_steps": 3}
    options |= {"max_train_steps": 5, "learning_rate": 1e-2, "trajectory_nums": 1, "train_batch_size": 2}
    options |= {"generate_with": "reference", "reference_sets": 2}
    for extra in ({"use_lora": True}, {}):
        made.clear(), seen.clear()
        assert train(flags(**options, **extra, output_dir=prompts.parent / f"{extra}")) == 0
        assert len(made) == 2 * 2  # prompts, sets
        of_step = [x_0.unflatten(0, (2, 2)) for x_0 in seen]  # both prompts, in either order

        def same(left, right):
            return torch.equal(left, right) or torch.equal(left.flip(0), right)

        assert same(of_step[0], of_step[2]) and same(of_step[0], of_step[4]) and same(of_step[1], of_step[3])
        assert not same(of_step[0], of_step[1])
    assert len({latents.sum().item() for latents in made}) == 4


@pytest.mark.usefixtures("no_result")
def test_kept_samples_are_judged_once_unless_without_a_score(train, flags, prompts, tmp_path):
    """A grader is paid once for a fixed data set; where it failed it is asked again."""
    asked = tmp_path / "asked.txt"
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n\n\ndef lazy(images, prompts):\n"
        f"    asked = Path({str(asked)!r})\n    first = not asked.exists()\n"
        "    with asked.open('a') as log:\n        log.write(f'{len(prompts)} {prompts[0]}\\n')\n"
        "    return images.mean((1, 2, 3)) * (float('nan') if first else 1)\n"
    )
    options = {**SAMPLES, "prompts_file": prompts, "train_data_dir": None, "num_noisy_latents": 2, "infer_steps": 3}
    options |= {"max_train_steps": 5, "trajectory_nums": 1, "train_batch_size": 2, "reward_failure": "skip"}
    options |= {"generate_with": "reference", "reference_sets": 2, "reward_model": f"{tmp_path}/mine.py:lazy"}
    assert train(flags(**options)) == 0
    calls = asked.read_text().splitlines()
    first, *others = calls
    assert calls == [f"2 {call[2:]}" for call in calls] and others.count(first) == 2  # its two sets, one of them again
    assert len(others) == 2 * 2 and len(set(others)) == 2
    lines = metrics(tmp_path / "run")
    assert [line["reward/failure_rate"] for line in lines] == [0.5, 0, 0, 0, 0]
    one, other = ([lines[step]["reward/mean"] for step in steps] for steps in ((2, 4), (1, 3)))
    assert one[0] == pytest.approx(one[1]) and other[0] == pytest.approx(other[1]) and one[0] != other[0]


def test_policy_gradient_matches_paths_prompts_and_rewards_across_slices(train, flags, tmp_path, monkeypatch):
    """Slices of 3 generate 8 samples of 2 prompts, slices of 5 train on them: what belongs together stays together."""
    from sharpening import draws, trajectory

    seen = {}

    def record(module, name):
        function = getattr(module, name)

        def recorded(*args):
            seen.setdefault(name, []).append((args, function(*args)))
            return seen[name][-1][1]

        monkeypatch.setattr(module, name, recorded)

    record(draws, "draw_path"), record(trajectory, "sample_path"), record(trajectory, "begin_samples")
    record(script, "policy_losses")
    options = {**POLICY, "num_noisy_latents": 4, "trajectory_nums": 2, "infer_steps": 4, "max_train_steps": 1}
    assert train(flags(**options, generation_batch_size=3, score_batch_size=5)) == 0
    ((_, (_, kept)),) = seen["draw_path"]
    (((_, latents, *_), scores),) = seen["begin_samples"]
    (((_, schedule, path, advantage, _), _),) = seen["policy_losses"]
    assert torch.equal(latents, torch.cat([x_0 for _, (x_0, _) in seen["sample_path"]]))
    for k, transition in enumerate(path):
        assert torch.equal(transition.t, schedule.timesteps[kept.flatten(0, 1)[:, k]])
        own = torch.cat([transitions[k].x for _, (_, transitions) in seen["sample_path"]])
        assert torch.equal(transition.x, own)
    rewards = scores().rewards.view(2, 4, 1)
    expected = trajectory.advantages(trajectory.select(rewards, torch.ones_like(rewards, dtype=torch.bool)))
    assert torch.equal(advantage, expected.flatten()) and advantage.abs().max() > 0.5


def test_policy_gradient_of_accumulated_batches_is_that_of_one(train, flags, tmp_path):
    options = {**POLICY, "num_noisy_latents": 3, "trajectory_nums": 2, "infer_steps": 4, "max_train_steps": 1}
    options |= {"learning_rate": 1e-3, "max_grad_norm": 1e9}
    one, four = tmp_path / "one", tmp_path / "four"
    assert train(flags(**options, train_batch_size=4, output_dir=one)) == 0
    parts = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "score_batch_size": 2}
    assert train(flags(**options, **parts, output_dir=four)) == 0
    (left,), (right,) = metrics(one), metrics(four)
    assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
    assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_policy_gradient_resumes_exactly_with_lora(train, flags, tmp_path):
    options = {**POLICY, "num_noisy_latents": 2, "trajectory_nums": 1, "infer_steps": 3, "use_lora": True}
    options |= {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-3}
    assert train(flags(**options, output_dir=tmp_path / "whole")) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = {"output_dir": tmp_path / "resumed", "resume_from_checkpoint": "latest"}
    assert train(flags(**options, **resumed)) == 0
    name = "pytorch_lora_weights.safetensors"
    assert same_tensors(tmp_path / "whole" / name, tmp_path / "resumed" / name)


def test_policy_gradient_refuses_to_start_from_pure_noise(train, flags, world, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    config = model / "scheduler" / "scheduler_config.json"
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    assert train(flags(**POLICY, pretrained_model_name_or_path=model, trajectory_nums=1)) == 2
    assert "rescale_betas_zero_snr" in capsys.readouterr().err


def test_resume_finds_the_same_pairs_of_the_reference(train, flags, tmp_path):
    options = {**QUICK, **SAMPLES, "generate_with": "reference", "train_batch_size": 5, "checkpointing_steps": 1}
    assert train(flags(**options, max_train_steps=4, output_dir=tmp_path / "whole")) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = {"output_dir": tmp_path / "resumed", "resume_from_checkpoint": "latest"}
    assert train(flags(**options, max_train_steps=4, **resumed)) == 0
    assert same_tensors(tmp_path / "whole" / WEIGHTS, tmp_path / "resumed" / WEIGHTS)


@pytest.mark.usefixtures("no_result")
def test_reused_generation_meets_new_noise_and_timesteps(train, flags, tmp_path, monkeypatch):
    drawn = []

    def record(args, draws, *rest):
        drawn.append([int(draw) for draw in draws])
        return draw_branches(args, draws, *rest)

    monkeypatch.setattr("sharpening.draws.draw_branches", record)
    assert train(flags(**QUICK, max_train_steps=4, generation_reuse=2)) == 0
    assert drawn == [[0, 2], [1, 3], [4, 6], [5, 7]]
    args = SimpleNamespace(
        seed=0, noise_offset=0, proportion_empty_prompts=0, timestep_bias_strategy="none", timestep_bias_portion=0.25,
        timestep_bias_begin=0, timestep_bias_end=1000, timestep_bias_multiplier=1.0,
    )  # fmt: skip
    first, second = (draw_branches(args, [n], 1, (4, 8, 8), timestep_probabilities(args, 1000)) for n in (0, 1))
    assert not torch.equal(first.eps, second.eps) and not torch.equal(first.t, second.t)


@pytest.mark.usefixtures("no_result")
def test_reference_stays_the_base_model(train, flags, world, tmp_path, monkeypatch):
    """Also after a resume: the checkpoint's weights are the model's, not the reference's."""
    references = []
    load = sdxl.load_frozen_unet
    monkeypatch.setattr(sdxl, "load_frozen_unet", lambda *args: references.append(load(*args)) or references[-1])
    options = {**QUICK, "checkpointing_steps": 1, "learning_rate": 1e-3}
    assert train(flags(**options, max_train_steps=1)) == 0
    assert train(flags(**options, max_train_steps=2, resume_from_checkpoint="latest")) == 0
    base = UNet2DConditionModel.from_pretrained(world.model, subfolder="unet")
    for reference in references:
        assert all(map(torch.equal, reference.parameters(), base.parameters()))
        assert not any(parameter.requires_grad for parameter in reference.parameters())
    first, second = metrics(tmp_path / "run")
    assert first["preference/kl"] < 1e-9 < second["preference/kl"]


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_at_the_reference_nothing_is_preferred_yet(precision, lora, train, flags, tmp_path):
    """On the trained tiny model, whose norms have weights of their own: rounded, they would be another model."""
    options = {"pretrained_model_name_or_path": ROOT / "tiny_world" / "sdxl", "mixed_precision": precision}
    options |= {"max_train_steps": 1, "reward_margin_scale": 0, "train_batch_size": 4, "infer_steps": 4}
    # One slice, so that model and reference see the same batches and round alike.
    options |= {"score_batch_size": 8, "use_lora": lora, **SAMPLES}
    assert train(flags(**options)) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert line["preference/accuracy"] == 0.5 and line["preference/logits"] == 0 and line["preference/kl"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_dpo": 10.0}, {"reward_margin_scale": 50.0}, {"branch_target": "consistent"}, {"snr_gamma": 5.0},
        {"train_on": "best"}, {"generate_with": "reference"}, POLICY,
        {"guidance_scale": 1.0}, {"latents_per_prompt": "n"}, {"latents_per_prompt": "n", "share_noise_in_pair": True},
        SAMPLES, {"generation_reuse": 2}, {"reference_steps": "first"},
    ],
    ids=lambda changes: ",".join(changes),
)  # fmt: skip
def test_flag_changes_what_is_learned(changes, train, flags, trained_once, tmp_path):
    options = {"max_train_steps": 2, "learning_rate": 1e-3, "max_grad_norm": 1e9}
    options |= {"infer_steps": 3, "trajectory_nums": 2}
    assert train(flags(**options, **changes)) == 0
    plain, changed = (load_file(run / WEIGHTS) for run in (trained_once(**options), tmp_path / "run"))
    moved = max(float((plain[name] - changed[name]).abs().max()) for name in plain)
    assert moved > 1e-4


def test_margin_outside_teaches_what_no_margin_teaches(train, flags, tmp_path):
    options = {"max_train_steps": 2, "infer_steps": 5, "learning_rate": 1e-3}
    outside = {"reward_margin": "outside", "reward_margin_scale": 50.0}
    assert train(flags(**options, **outside, output_dir=tmp_path / "outside")) == 0
    assert train(flags(**options, reward_margin_scale=0, output_dir=tmp_path / "none")) == 0
    assert same_tensors(tmp_path / "outside" / WEIGHTS, tmp_path / "none" / WEIGHTS)


@pytest.mark.usefixtures("no_result")
def test_prompt_without_two_scores_carries_no_gradient(train, flags, prompts, tmp_path):
    """One prompt's images never have a score, the other's always; the pair of the latter alone counts."""
    code = (
        "import torch\n\n\ndef picky(images, prompts):\n    scores = images.mean((1, 2, 3))\n"
        "    return torch.where(torch.tensor(['red' in p for p in prompts]), torch.nan, scores)\n"
    )
    (tmp_path / "mine.py").write_text(code)
    options = {"reward_model": f"{tmp_path}/mine.py:picky", "prompts_file": prompts, "train_data_dir": None}
    options |= {"max_train_steps": 1, "infer_steps": 5, "reward_failure": "skip"}
    assert train(flags(**options)) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["reward/failure_rate"] == 0.5
    assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0
    assert train(flags(**{**options, "reward_failure": "raise"}, output_dir=tmp_path / "raise")) == 1


# ---------------------------------------------------------------------------------------------------------- warnings


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


def watch_over(lines, moving=True, branches=3, rows=10):
    parameters = [torch.zeros(3)]
    watch = Watch(SimpleNamespace(num_noisy_latents=branches), rows, parameters)
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


def test_one_branch_is_no_flat_reward(caplog):
    watch_over([{"reward/tie_rate": 1.0}] * 50, branches=1)
    assert caplog.records == []


def test_diverged_generation_stops_with_one_sentence(train, flags, world, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias.fill_(float("nan"))
    unet.save_pretrained(model / "unet")
    assert train(flags(pretrained_model_name_or_path=model, **QUICK)) == 1
    error = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "step 1: the generated latents are not finite" in error and "--learning_rate" in error
