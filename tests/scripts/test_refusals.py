"""Bad input: one sentence on stderr that names the flag or file and the remedy, exit status 2, no stack trace."""

import json
import shutil

import numpy as np
import pytest
import wandb
from PIL import Image


def drawn(folder, name="0.png", text="a red circle on a white background"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / name)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": name, "text": text}) + "\n")
    return folder


def corrupt_image(folder, world):
    drawn(folder / "corrupt")
    (folder / "corrupt" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    return {"train_data_dir": folder / "corrupt"}


def empty_data_set(folder, world):
    import datasets

    datasets.Dataset.from_dict({"image": [], "text": []}).to_parquet(folder / "empty.parquet")
    return {"train_data_dir": None, "dataset_name": folder / "empty.parquet"}


def model_without(part, file):
    def build(folder, world):
        shutil.copytree(world.model, folder / "model")
        if file is None:
            shutil.rmtree(folder / "model" / part)
        else:
            (folder / "model" / part / file).unlink()
        return {"pretrained_model_name_or_path": folder / "model"}

    return build


def incomplete_checkpoint(folder, world):
    (folder / "checkpoint-3").mkdir()
    return {"resume_from_checkpoint": folder / "checkpoint-3"}


def occupied_output(folder, world):
    checkpoint = folder / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 3}')
    return {}


def output_below_a_file(folder, world):
    (folder / "file").write_text("")
    return {"output_dir": folder / "file" / "run"}


def reward_file(text, name="score"):
    def build(folder, world):
        (folder / "my_reward.py").write_text(text)
        return {"reward_model": f"{folder}/my_reward.py:{name}"}

    return build


def empty_prompts(folder, world):
    (folder / "prompts.txt").write_text("\n  \n")
    return {"validation_prompts_file": folder / "prompts.txt"}


# what is wrong: (flags, or a function of (folder, world) that makes them; what the sentence must say)
CASES = {
    "no data": ({"train_data_dir": None}, ["--dataset_name", "--train_data_dir"]),
    "two data sets": ({"dataset_name": "owner/data"}, ["--dataset_name and --train_data_dir", "give one"]),
    "missing image folder": ({"train_data_dir": "/nowhere"}, ["--train_data_dir /nowhere", "give an image folder"]),
    "missing data file": ({"train_data_dir": None, "dataset_name": "./no.parquet"}, ["--dataset_name './no.parquet'"]),
    "empty data set": (empty_data_set, ["--dataset_name", "has rows in its train split"]),
    "wrong image column": ({"image_column": "picture"}, ["--image_column 'picture'", "choose one of: image, text"]),
    "wrong caption column": ({"caption_column": "cap"}, ["--caption_column 'cap'", "choose one of: image, text"]),
    "captions that are images": ({"caption_column": "image"}, ["--caption_column 'image'"]),
    "corrupt image": (corrupt_image, ["0.png", "remove or replace it"]),
    "missing model folder": (
        {"pretrained_model_name_or_path": "/nowhere/model"},
        ["--pretrained_model_name_or_path /nowhere/model", "does not exist"],
    ),
    "folder without a pipeline": ({"pretrained_model_name_or_path": "tests"}, ["model_index.json", "save_pretrained"]),
    "model without UNet weights": (
        model_without("unet", "diffusion_pytorch_model.safetensors"),
        ["--pretrained_model_name_or_path", "UNet2DConditionModel", "check the name"],
    ),
    "model without scheduler": (model_without("scheduler", None), ["scheduler/scheduler_config.json"]),
    "model without tokenizer": (model_without("tokenizer", None), ["/tokenizer", "no vocabulary", "check the name"]),
    "model without text encoder": (model_without("text_encoder", None), ["text_encoder", "check the name"]),
    "missing VAE": ({"pretrained_vae_model_name_or_path": "./vae"}, ["--pretrained_vae_model_name_or_path ./vae"]),
    "missing reward VAE": ({"reward_vae": "./taesd"}, ["--reward_vae ./taesd", "does not exist"]),
    "variant that does not exist": ({"variant": "fp16"}, ["fp16", "--variant"]),
    "resolution not divisible by 8": ({"resolution": 100}, ["--resolution is 100", "multiple of 8", "try 96"]),
    "no branch": ({"num_noisy_latents": 0}, ["--num_noisy_latents is 0", "at least 1"]),
    "no step": ({"trajectory_nums": 0}, ["--trajectory_nums is 0", "at least 1"]),
    "more steps than a trajectory": (
        {"trajectory_nums": 26, "infer_steps": 25},
        ["--trajectory_nums is 26", "--infer_steps=25"],
    ),
    "more sampling steps than timesteps": ({"infer_steps": 1001}, ["--infer_steps", "1000"]),
    "more sampling steps in validation": ({"validation_infer_steps": 1001}, ["--validation_infer_steps", "1000"]),
    "bias beyond the schedule": (
        {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2, "timestep_bias_end": 1001},
        ["--timestep_bias_end", "1000"],
    ),
    "empty bias range": (
        {"timestep_bias_strategy": "range", "timestep_bias_multiplier": 2, "timestep_bias_begin": 1000},
        ["--timestep_bias_begin=1000", "below end"],
    ),
    "bias without effect": ({"timestep_bias_strategy": "later"}, ["--timestep_bias_strategy=later", "multiplier"]),
    "unknown reward": ({"reward_model": "clipp"}, ["--reward_model", "clip"]),
    "reward weights out of reach": ({"reward_model": "image_reward"}, ["--reward_model", "THUDM/ImageReward", "hub"]),
    "mllm without a key": ({"reward_model": "mllm"}, ["OPENAI_API_KEY"]),
    "mllm out of reach": (
        {"reward_model": "mllm", "base_url": "http://127.0.0.1:9/v1"},
        ["http://127.0.0.1:9/v1", "cannot be reached", "--base_url"],
    ),
    "unknown template": ({"reward_model": "mllm", "mllm_template": "nice"}, ["--mllm_template nice", "five_aspects"]),
    "no call allowed": ({"mllm_max_calls": 0}, ["--mllm_max_calls is 0", "at least 1"]),
    "no time for a call": ({"mllm_timeout": 0}, ["--mllm_timeout is 0", "above 0"]),
    "negative retries": ({"mllm_max_retries": -1}, ["--mllm_max_retries is -1"]),
    "compositional out of reach": ({"reward_model": "compositional"}, ["comin/IterComp", "could not be listed"]),
    "compositional models that cannot be told apart": (
        {"reward_model": "compositional:tests"},
        ["in tests (there is none)", "--compositional_models attribute=PATH"],
    ),
    "weights that do not match": (
        {"reward_model": "compositional", "compositional_models": "a=x,b=y", "compositional_weights": "1"},
        ["--compositional_weights 1", "2 numbers"],
    ),
    "missing checkpoint of a reward": ({"reward_model": "image_reward:./no.pt"}, ["image_reward:./no.pt", "no file"]),
    "weight that is no number": ({"reward_model": "shapes:much"}, ["--reward_model", "much"]),
    "missing reward file": ({"reward_model": "./nothing.py:score"}, ["--reward_model", "nothing.py"]),
    "reward file without that name": (reward_file("other = 1"), ["--reward_model", "score"]),
    "reward file that does not import": (reward_file("import nonsense_package"), ["--reward_model", "nonsense"]),
    "CLIP weights out of reach": ({"reward_model": "clip"}, ["--clip_model"]),
    "output below a file": (output_below_a_file, ["--output_dir", "choose another"]),
    "output of another run": (occupied_output, ["already holds checkpoint-3", "--resume_from_checkpoint latest"]),
    "missing checkpoint": ({"resume_from_checkpoint": "/nowhere"}, ["--resume_from_checkpoint /nowhere", "latest"]),
    "incomplete checkpoint": (incomplete_checkpoint, ["--resume_from_checkpoint", "not a complete checkpoint"]),
    "two kinds of validation prompts": (
        {"validation_prompt": "a", "validation_prompts_file": "b"},
        ["--validation_prompt and --validation_prompts_file"],
    ),
    "missing prompts file": ({"validation_prompts_file": "/no.txt"}, ["--validation_prompts_file /no.txt"]),
    "empty prompts file": (empty_prompts, ["--validation_prompts_file", "empty"]),
    "xformers without a GPU": (
        {"enable_xformers_memory_efficient_attention": True},
        ["--enable_xformers_memory_efficient_attention", "--no-enable_xformers_memory_efficient_attention"],
    ),
    "NPU attention without an NPU": ({"enable_npu_flash_attention": True}, ["--enable_npu_flash_attention"]),
    "fp16 without a GPU": ({"mixed_precision": "fp16"}, ["--mixed_precision=fp16", "bf16"]),
    "share above one": ({"proportion_empty_prompts": 1.5}, ["--proportion_empty_prompts is 1.5", "[0, 1]"]),
    "negative learning rate": ({"learning_rate": -1}, ["--learning_rate is -1", "above 0"]),
    "negative snr_gamma": ({"snr_gamma": -5}, ["--snr_gamma is -5"]),
    "hub id without push": ({"hub_model_id": "me/model"}, ["--hub_model_id", "--push_to_hub"]),
    "unknown flag": ({"learning_rates": 1}, ["--learning_rates", "--help"]),
    "abbreviated flag": ({"resol": 32}, ["--resol"]),
    "flag of the wrong type": ({"resolution": "big"}, ["--resolution", "big"]),
    "negative seed": ({"seed": -1}, ["--seed is -1"]),
    "W&B without a login": ({"report_to": "wandb"}, ["--report_to wandb", "wandb login", "WANDB_MODE=offline"]),
    "no row to train on": ({"train_rows": 0}, ["--train_rows is 0", "at least 1"]),
    "no branch to score": ({"score_batch_size": 0}, ["--score_batch_size is 0", "at least 1"]),
    "no checkpoint kept": ({"checkpoints_total_limit": 0}, ["--checkpoints_total_limit is 0"]),
    "no rank": ({"use_lora": True, "lora_rank": 0}, ["--lora_rank is 0", "at least 1"]),
    "alpha of zero": ({"use_lora": True, "lora_alpha": 0}, ["--lora_alpha is 0", "above 0"]),
    "rank without LoRA": ({"lora_rank": 8}, ["--lora_rank", "without --use_lora; add it"]),
}
# Of the cases above, those about images, which RLHF does not read.
SFT_ONLY = {"wrong image column", "captions that are images", "corrupt image", "no branch"}


def prompts(text, suffix="txt", **flags):
    def build(folder, world):
        path = folder / f"prompts.{suffix}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return {"train_data_dir": None, "prompts_file": path, **flags}

    return build


RLHF_CASES = {
    "no prompts at all": ({"train_data_dir": None}, ["no training data", "--prompts_file"]),
    "prompts and a data set": ({"prompts_file": "p.txt"}, ["--train_data_dir and --prompts_file", "give one"]),
    "missing prompts to train on": (
        {"train_data_dir": None, "prompts_file": "/no.txt"}, ["--prompts_file /no.txt", "cannot be read"],
    ),
    "prompts that are a folder": (
        {"train_data_dir": None, "prompts_file": "tests"}, ["--prompts_file tests", "cannot be read"],
    ),
    "prompts that are all empty": (prompts("\n  \n"), ["holds no prompt", "one prompt a line"]),
    "prompts in another encoding": (prompts("café".encode("latin-1")), ["--prompts_file", "UTF-8"]),
    "csv without the column": (prompts("a,b\n1,2\n", "csv"), ["no 'text' in row 1, only a, b", "--caption_column"]),
    "jsonl without the column": (prompts('{"a": "b"}', "jsonl"), ["no 'text' in row 1", "--caption_column"]),
    "jsonl that is no JSON": (prompts("a red circle", "jsonl"), ["--prompts_file", "cannot be read"]),
    "jsonl of lists": (prompts("[1]", "jsonl"), ["no 'text' in row 1, only list"]),
    "csv with an unquoted comma": (prompts("text\na cat, sitting\n", "csv"), ["more fields in row 1", "in quotes"]),
    "prompts of another kind": (prompts("[]", "json"), ["must end in .txt", ".csv or .jsonl"]),
    "prompts that are numbers": (prompts('{"text": 3}', "jsonl"), ["int 3 in row 0", "not a text"]),
    "wrong caption column of a data set": ({"caption_column": "cap"}, ["--caption_column 'cap'", "text"]),
    "captions that are pictures": ({"caption_column": "image"}, ["--caption_column 'image'", "not a text"]),
    "one branch": ({"num_noisy_latents": 1}, ["--num_noisy_latents is 1", "2 branches"]),
    "no branches": ({"num_noisy_latents": 0}, ["--num_noisy_latents is 0"]),
    "beta of zero": ({"beta_dpo": 0}, ["--beta_dpo is 0", "above 0"]),
    "negative margin": ({"reward_margin_scale": -1}, ["--reward_margin_scale is -1", "negative"]),
    "negative guidance": ({"guidance_scale": -1}, ["--guidance_scale is -1", "negative"]),
    "no reuse": ({"generation_reuse": 0}, ["--generation_reuse is 0"]),
    "no generation batch": ({"generation_batch_size": 0}, ["--generation_batch_size is 0"]),
    "some latents": ({"latents_per_prompt": 2}, ["--latents_per_prompt", "2"]),
    "policy as a mode": (
        {"train_on": "policy"}, ["--train_on is no flag of this script any more", "policy is baselines/ddpo.py"],
    ),
    "best as a mode": ({"train_on": "best"}, ["--train_on", "best is baselines/best_of_n.py"]),
    "samples of the reference": (
        {"generate_with": "reference"}, ["--generate_with is no flag of this script", "baselines/diffusion_dpo.py"],
    ),
    "sets of the reference": (
        {"reference_sets": 2}, ["--reference_sets is no flag of this script", "diffusion_dpo.py with --sets"],
    ),
    "samples of one latent": ({"reward_on": "sample"}, ["--reward_on=sample", "--latents_per_prompt=n"]),
    "shared and generating noise": (
        {"share_noise_in_pair": True, "branch_noise": "generation"},
        ["--share_noise_in_pair and --branch_noise=generation exclude each other"],
    ),
    "one latent and one noise": (
        {"share_noise_in_pair": True}, ["--branch_noise=shared needs", "--latents_per_prompt=n"],
    ),
    "one latent and its own noise": (
        {"branch_noise": "generation"}, ["--branch_noise=generation needs", "--latents_per_prompt=n"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "case"),
    [
        *(("SFT", case) for case in CASES),
        *(("RLHF", case) for case in CASES if case not in SFT_ONLY),
        *(("RLHF", case) for case in RLHF_CASES),
    ],
    indirect=["method"],
)
def test_refused_in_one_sentence(method, case, train, flags, world, tmp_path, capsys, request, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()  # it keeps the environment that it was first used in
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    changes, expected = (CASES | RLHF_CASES)[case]
    if callable(changes):
        changes = changes(tmp_path, world)
    if torch_gpu() and "GPU" in case:
        request.applymarker(pytest.mark.skip(reason="needs a machine without a GPU"))
    before = sorted(str(path) for path in tmp_path.rglob("checkpoint-*"))
    assert train(flags(**changes)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    for part in expected:
        assert part in lines[0]
    assert sorted(str(path) for path in tmp_path.rglob("checkpoint-*")) == before


@pytest.fixture
def method(request):
    return request.param


def torch_gpu():
    import torch

    return torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SFT", "RLHF"], indirect=True)
@pytest.mark.parametrize("launcher", ["python", "accelerate"])
def test_refused_through_a_real_launch(launcher, launch, flags):
    result = launch(flags(resolution=100), launcher)
    assert "error: --resolution is 100" in result.stderr
    if launcher == "python":  # accelerate turns every status into 1 and prints its own trace
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    else:
        assert result.returncode != 0
