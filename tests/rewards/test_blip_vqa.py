"""BLIP-VQA against transformers' own generation, one question at a time, on a tiny random BLIP."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from torchvision import transforms

from reward import load_reward
from sharpening.errors import UserError
from sharpening.rewards.blip_vqa_network import questions
from sharpening.rewards.preprocessing import CLIP_MEAN, CLIP_STD, preprocess

PROMPTS = [
    "a red cube and a green house",
    "The soft, fluffy cloud was above the old castle and the sea.",
    "two dogs",
    "",
    "a fish on the left of a bird",
    "a red cube and a red cube",
]


@pytest.fixture(scope="module")
def images():
    coarse = torch.rand(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (64, 80), mode="bilinear")


@pytest.fixture(scope="module")
def reward(tiny_blip_vqa):
    return load_reward(f"blip_vqa:{tiny_blip_vqa}")


def generated(folder, image, question):
    """P(yes) / (P(yes) + P(no)) from the first step of transformers' own `generate`, for one image and question."""
    from transformers import BlipForQuestionAnswering, BlipProcessor

    model, processor = BlipForQuestionAnswering.from_pretrained(folder), BlipProcessor.from_pretrained(folder)
    tokens = processor.tokenizer(question, return_tensors="pt").input_ids
    tokens[0, 0] = model.config.text_config.vocab_size - 1  # [ENC], as in BLIP's own code
    pixels = transforms.functional.resize(image[None], [480, 480], transforms.InterpolationMode.BICUBIC)
    pixels = transforms.functional.normalize(pixels.clamp(0, 1), CLIP_MEAN, CLIP_STD)
    answer = model.generate(
        tokens, pixels, interpolate_pos_encoding=True, max_new_tokens=1, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    p = answer.logits[0][0].softmax(dim=0)
    yes, no = (p[processor.tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no"))
    return (yes / (yes + no)).item()


# --------------------------------------------------------------------------------------------------------- the score


def test_questions_are_those_of_the_benchmark():
    assert questions("A red apple and a green Bench.") == ["a red apple?", "a green bench?"]
    assert questions("The cat is on the left of the mat, on top of a box") == ["the cat?", "the mat?", "a box?"]
    assert questions("(Sitting) was!") == ["sitting was?"]  # no noun phrase: the prompt itself
    assert questions("A dog in a box, which it likes.") == ["a dog?", "a box?", "which?", "it?"]
    assert questions("on the left") == ["on the left?"]
    assert questions("") == ["?"]
    assert len(questions(", ".join(f"a red thing{n}" for n in range(12)))) == 8


def test_each_answer_is_that_of_transformers_alone(reward, tiny_blip_vqa, images):
    scorer = reward._scorers[0].__self__.scorer
    asked = ["a red cube?", "the soft, fluffy cloud above the old castle by the sea?", "two dogs?", "?", "a fish?"]
    rows = torch.tensor([0, 1, 1, 5, 3])  # some images twice, some never
    together = scorer.probability_of_yes(images, asked, rows)
    alone = [generated(tiny_blip_vqa, images[row], question) for row, question in zip(rows, asked, strict=True)]
    torch.testing.assert_close(together, torch.tensor(alone), atol=1e-5, rtol=0)
    assert together.std() > 0.05


def test_score_is_the_product_over_the_phrases(reward, tiny_blip_vqa, images):
    scores = reward.get_reward(images, PROMPTS)
    expected = [
        math.prod(generated(tiny_blip_vqa, image, question) for question in questions(prompt))
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)
    assert scores.dtype == torch.float32 and scores.min() >= 0 and scores.max() <= 1
    single = reward.get_reward(images[5:], ["a red cube"])
    torch.testing.assert_close(scores[5:], single**2)


def test_score_is_the_same_alone_and_in_any_batch(reward, images):
    together = reward.get_reward(images, PROMPTS)
    alone = torch.cat([reward.get_reward(images[row : row + 1], [PROMPTS[row]]) for row in range(6)])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    shuffled = reward.get_reward(images[order], [PROMPTS[row] for row in order])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)
    assert torch.equal(reward.get_reward(images, PROMPTS), together)


def test_each_image_is_encoded_once(reward, images, monkeypatch):
    vision, seen = reward._scorers[0].__self__.scorer.blip.vision_model, []
    handle = vision.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    reward.get_reward(images, PROMPTS)
    handle.remove()
    assert sum(seen) == len(images)


def test_images_differ_from_the_path_through_pil_by_its_rounding_only():
    """The benchmark squashes PIL images; a standard deviation is about 0.26."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    noise = (torch.nn.functional.interpolate(coarse, (40, 60), mode="bilinear") * 255).round() / 255
    picture = Image.fromarray((noise[0] * 255).round().byte().permute(1, 2, 0).numpy())
    steps = [transforms.Resize((480, 480), transforms.InterpolationMode.BICUBIC), transforms.ToTensor()]
    published = transforms.Compose([*steps, transforms.Normalize(CLIP_MEAN, CLIP_STD)])(picture)
    assert (preprocess(noise, 480, resize_mode="squash")[0] - published).abs().max() < 2.5 / 255 / 0.26


def test_extreme_input_has_an_ordinary_score(reward):
    images = torch.stack([torch.zeros(3, 8, 300), torch.ones(3, 8, 300)])
    scores = reward.get_reward(images, ["old " * 60 + "castle", "🚀, 月"])
    assert scores.isfinite().all() and scores.min() > 0 and scores.max() < 1


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "~/nowhere", "word", "{folder}/config.json", "a/b/c"])
def test_missing_folder_is_refused_before_transformers_is_asked(model, tiny_blip_vqa, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.BlipConfig, "from_pretrained", None)
    with pytest.raises(UserError) as caught:
        load_reward(f"blip_vqa:{model.format(folder=tiny_blip_vqa)}")
    message = str(caught.value)
    assert message.startswith("--reward_model blip_vqa:") and "there is no folder" in message and "\n" not in message


@pytest.mark.parametrize("config", [None, "not json", "[]", "{}", '{"model_type": "clip"}'])
def test_folder_of_something_else_is_refused(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"--reward_model blip_vqa:.* holds no config.json of a BLIP; give one that"):
        load_reward(f"blip_vqa:{tmp_path}")


def test_hub_out_of_reach_is_one_sentence():
    with pytest.raises(UserError, match="blip_vqa:Salesforce/blip-vqa-base could not be loaded") as caught:
        load_reward("blip_vqa")
    assert "check the name and the connection" in str(caught.value) and "\n" not in str(caught.value)


def without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink()


def without_processor(folder):
    (folder / "processor_config.json").unlink()


def without_yes(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["jawohl"] = tokenizer["model"]["vocab"].pop("yes")
    path.write_text(json.dumps(tokenizer))
    (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text().replace("\nyes\n", "\njawohl\n"))


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def captioning(folder):
    """A BLIP that writes captions has no text encoder; transformers would make up a random one."""
    from safetensors.torch import load_file, save_file

    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("text_encoder.")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_tokenizer, ""),
        (without_processor, ""),
        (without_yes, "has no words yes and no"),
        (without_weights, "no file named model.safetensors"),
        (captioning, r"it lacks \d+ weights, text_encoder\."),
    ],
)
def test_incomplete_folder_is_refused(damage, said, tiny_blip_vqa, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_blip_vqa, folder)
    load_reward(f"blip_vqa:{folder}")
    damage(folder)
    with pytest.raises(UserError, match=f"--reward_model blip_vqa:.*could not be loaded .*{said}") as caught:
        load_reward(f"blip_vqa:{folder}")
    assert "\n" not in str(caught.value) and "give a folder that holds" in str(caught.value)
