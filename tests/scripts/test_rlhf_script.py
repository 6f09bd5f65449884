"""What only the RLHF script promises: prompts alone, what branches start from, the reference, what is learned."""

import math
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from sharpening.draws import Draws, draw_noise, timestep_probabilities
from sharpening.trajectory import Schedule
from tests.support.objective import SDXL
from tests.support.runs import ROOT, metrics, plan_of, same_tensors

CAPTIONS = ["a red circle on a white background", "a blue square on a gray background"]
SAMPLES = {"reward_on": "sample", "latents_per_prompt": "n"}
QUICK = {"infer_steps": 2, "trajectory_nums": 1, "num_noisy_latents": 2}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SHAPE = (4, 8, 8)
# With these a checkpoint after the first step holds the latents, which serve the second one, too.
KEPT = {"generation_reuse": 2, "max_train_steps": 1, "checkpointing_steps": 1}


@pytest.fixture
def method():
    return "RLHF"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return path


def kept_latents(run):
    (entry,) = torch.load(run / "checkpoint-1" / "pending_0.pt", weights_only=True)
    return entry["prompts"], entry["latents"]


def test_prompts_file_is_all_the_data_a_run_needs(train, flags, tmp_path, capsys, encodes):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([CAPTIONS[0], "", CAPTIONS[1], CAPTIONS[0], "   "]) + "\n")
    assert train(flags(train_data_dir=None, prompts_file=path, **QUICK)) == 0
    plan = plan_of(capsys.readouterr().out)
    assert plan["data"] == (
        f"2 prompts of {path} (5 read: 2 empty and 1 repeated left out, 0 of several lines joined)"
    )
    assert plan["steps"] == "2, 1 per epoch, 2.00 epochs"
    assert encodes == []


def test_caption_column_of_an_image_folder_is_read_without_its_images(train, flags, world, tmp_path, encodes):
    folder = tmp_path / "shapes"
    shutil.copytree(world.shapes, folder)
    for image in folder.glob("*.png"):
        image.write_bytes(b"no picture")
    assert train(flags(train_data_dir=folder, **QUICK)) == 0
    assert encodes == []


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize(
    ("latents", "noise"), [("1", "fresh"), ("n", "fresh"), ("n", "shared"), ("n", "generation")],
    ids=["one latent", "latents of their own", "shared noise", "noise of the generation"],
)  # fmt: skip
def test_branches_start_from_the_latents_and_noises_asked_for(latents, noise, train, flags, tmp_path, forwards):
    assert train(flags(**QUICK, **KEPT, latents_per_prompt=latents, branch_noise=noise)) == 0
    _, x_0 = kept_latents(tmp_path / "run")
    assert x_0.shape == (2 if latents == "1" else 4, *SHAPE) and len({float(x.sum()) for x in x_0}) == len(x_0)
    # Two prompts, two branches each. Draws 0 and 1 are shown; in their first of two uses they are numbered 0 and 2.
    drawn = Draws(0, timestep_probabilities(1000)).noising([0, 2], 1 if noise == "shared" else 2, SHAPE)
    eps = drawn.eps.expand(-1, 2, *SHAPE)
    if noise == "generation":
        eps = draw_noise(0, [0, 1], 2, SHAPE)
    x_0 = x_0.repeat_interleave(4 // len(x_0), 0)
    t = drawn.t.repeat_interleave(2)
    (scored,) = [forward for forward in forwards if not forward.gradient and not forward.without_prompt.any()][:1]
    assert torch.equal(scored.t, t)
    torch.testing.assert_close(scored.x, Schedule.from_config(SDXL, 2).add_noise(x_0, eps.flatten(0, 1), t))


@pytest.mark.usefixtures("no_result")
def test_generation_equals_the_pipeline_of_the_current_model(train, flags, world, prompts, tmp_path):
    """The first generated latents against stock diffusers from the same noise, guidance included."""
    changes = {"prompts_file": prompts, "train_data_dir": None, "generation_batch_size": 1}
    assert train(flags(**changes, **KEPT, infer_steps=4, guidance_scale=3.0)) == 0
    captions, latents = kept_latents(tmp_path / "run")
    pipeline = StableDiffusionXLPipeline.from_pretrained(world.model)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "height": 32, "width": 32}
    noise = draw_noise(0, [0, 1], 1, SHAPE).flatten(0, 1)
    theirs = pipeline(captions, latents=noise, **options).images
    assert sorted(captions) == sorted(CAPTIONS)
    assert (latents - theirs).abs().max() < 1e-3 * theirs.abs().max()


@pytest.mark.usefixtures("no_result")
def test_reference_stays_the_base_model(train, flags, world, tmp_path, forwards):
    """Also after a resume: the checkpoint's weights are the model's, not the reference's."""
    options = {**QUICK, "checkpointing_steps": 1, "learning_rate": 1e-3}
    assert train(flags(**options, max_train_steps=1)) == 0
    assert train(flags(**options, max_train_steps=2, resume_from_checkpoint="latest")) == 0
    base = UNet2DConditionModel.from_pretrained(world.model, subfolder="unet")
    references = {id(forward.unet): forward.unet for forward in forwards if forward.frozen}
    assert len(references) == 2  # one in each run
    for reference in references.values():
        assert all(map(torch.equal, reference.parameters(), base.parameters()))
    first, second = metrics(tmp_path / "run")
    assert first["preference/kl"] < 1e-9 < second["preference/kl"]


@pytest.mark.usefixtures("no_result")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("rows", [4, 8], ids=["walked", "in one forward"])
def test_at_the_reference_nothing_is_preferred_yet(rows, precision, lora, train, flags, tmp_path):
    """On the trained tiny model, whose norms have weights of their own: rounded, they would be another model."""
    options = {"pretrained_model_name_or_path": ROOT / "tiny_world" / "sdxl", "mixed_precision": precision}
    options |= {"max_train_steps": 1, "reward_margin_scale": 0, "train_batch_size": 4, "infer_steps": 4}
    # Slices of one size, so that model and reference see batches alike and round alike.
    options |= {"score_batch_size": rows, "train_rows": rows, "trajectory_nums": 1, "use_lora": lora, **SAMPLES}
    assert train(flags(**options)) == 0
    (line,) = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert line["preference/accuracy"] == 0.5 and line["preference/logits"] == 0 and line["preference/kl"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_dpo": 10.0}, {"reward_margin_scale": 50.0}, {"branch_target": "consistent"}, {"snr_gamma": 5.0},
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
