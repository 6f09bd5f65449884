"""T2I-CompBench's spatial score: its detectors against transformers' own processors, on tiny random networks."""

import json
import shutil

import pytest
import torch

from reward import load_reward
from sharpening.errors import UserError
from sharpening.rewards.calling import RewardError
from sharpening.rewards.spatial_relation import Detection, find_relation, spatial_score
from sharpening.rewards.zero_shot_detector import load_detector
from tests.support.hooks import rows_through
from tests.support.reward_inputs import noise, to_pil

PROMPTS = [
    "a cat on the left of a dog",
    "a house next to a zxqvjk",
    "The old street lamp was on top of the red house.",
    "a cat on the right of a moon",
    "a man near a woman",
    "a fish on side of a blue bird",
]
PAIRS = [("cat", "dog"), ("house", "zxqvjk"), ("street lamp", "house"), ("moon", "cat"), ("person", "person"),
         ("fish", "bird")]  # fmt: skip
KINDS = ["grounding_dino", "owlv2"]


@pytest.fixture(scope="module")
def images():
    """Of a size that Grounding DINO's processor leaves as it is: where it resizes, it rounds PIL images to 8 bits."""
    return noise(6, 96, 120)


@pytest.fixture(params=KINDS)
def folder(request):
    return request.getfixturevalue(f"tiny_{request.param}")


def detector_in(folder, threshold=0.05):
    return load_detector("--detector", str(folder), threshold, "cpu", None, None)


def scores_and_boxes(folder, picture, pair):
    """Scores (2, Q) and boxes (Q, 4) in px of one image, from transformers' own processor and post-processing."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    grounding = model.config.model_type == "grounding-dino"
    text = [list(pair)] if grounding else [[f"a photo of a {thing}" for thing in pair]]
    inputs = processor(images=picture, text=text, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    size = [(picture.height, picture.width)]
    (found,) = processor.post_process_grounded_object_detection(output, threshold=-1, target_sizes=size)
    logits = output.logits[0].T  # of tokens or of things
    if grounding:
        dots = (inputs.input_ids[0] == processor.tokenizer.convert_tokens_to_ids(".")).nonzero().flatten().tolist()
        logits = torch.stack([logits[1 : dots[0]].amax(0), logits[dots[0] + 1 : dots[1]].amax(0)])
    return logits.sigmoid(), found["boxes"]


# ------------------------------------------------------------------------------------------------------ the detectors


def test_detections_are_those_of_transformers_alone(folder, images):
    detections = detector_in(folder).detect(images, PAIRS)
    missing = 0
    for picture, pair, found in zip(to_pil(images), PAIRS, detections, strict=True):
        scores, boxes = scores_and_boxes(folder, picture, pair)
        for thing in range(2):
            own = scores[thing] >= scores[1 - thing]  # the boxes that fit this thing better
            best = scores[thing].where(own, 0).argmax()
            if not own.any() or scores[thing, best] <= 0.05:
                assert found[thing] is None
                missing += 1
                continue
            assert found[thing].score == pytest.approx(scores[thing, best].item(), abs=1e-4)
            expected = boxes[best].clamp(min=torch.zeros(4), max=torch.tensor([120.0, 96.0, 120.0, 96.0]))
            assert found[thing].box == pytest.approx(expected.tolist(), abs=1e-2)
    assert missing < 3


def test_one_thing_named_twice_is_one_detection(folder, images):
    first, second = detector_in(folder).detect(images[:1], [("person", "person")])[0]
    assert first == second is not None


def test_boxes_lie_within_the_image(folder):
    for size in ((48, 96), (96, 48)):
        images = noise(8, *size, seed=1)
        for pair in detector_in(folder, 0).detect(images, [("cat", "dog")] * 8):
            for left, top, right, bottom in (found.box for found in pair if found):
                assert 0 <= left <= right <= size[1] and 0 <= top <= bottom <= size[0]


@pytest.mark.parametrize(("kind", "threshold"), [("grounding_dino", 0.35), ("owlv2", 0.1)])
def test_box_is_reported_above_the_threshold(kind, threshold, images, request):
    folder = request.getfixturevalue(f"tiny_{kind}")
    assert detector_in(folder, None).threshold == threshold
    score = detector_in(folder, 0).detect(images[:1], PAIRS[:1])[0][0].score
    assert detector_in(folder, score - 1e-4).detect(images[:1], PAIRS[:1])[0][0] is not None
    assert detector_in(folder, score + 1e-4).detect(images[:1], PAIRS[:1])[0][0] is None


def test_each_image_is_seen_once_for_both_things(folder, images):
    detector = detector_in(folder)
    backbone = {"grounding-dino": "model.backbone", "owlv2": "owlv2.vision_model"}[detector.network.config.model_type]
    with rows_through(type(detector.network.get_submodule(backbone))) as seen:
        detector.detect(images, PAIRS)
    assert sum(seen) == len(images)


# ---------------------------------------------------------------------------------------------------------- the score


def test_score_is_the_rule_on_the_detections(folder, images):
    reward = load_reward("t2i_spatial", detector=str(folder), detector_threshold=0.05)
    scores = reward.get_reward(images, PROMPTS)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        relation = find_relation(prompt)
        (pair,) = detector_in(folder).detect(image[None], [(relation.first, relation.second)])
        scaled = [found and Detection(found.score, tuple(edge * 480 / 120 for edge in found.box)) for found in pair]
        expected.append(spatial_score(relation.place, *scaled))
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=0)
    assert scores.dtype == torch.float32 and scores.min() == 0 and 0.5 <= scores.max() <= 1


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat on the left of a dog", 0.25 * 0.7 + 0.25 * 0.5 + 0.5),
        ("a cat on the right of a dog", 0),
        ("a cat on top of a dog", 0),
        ("a cat near a dog", 0.175 + 0.125 + 0.5 * 150 / (320 * 479 / 512)),
    ],
)
def test_score_of_given_boxes(prompt, expected, tiny_owlv2, monkeypatch):
    """Centres of an image of 512 px: (96, 96) and (416, 300); the distances are 320 and 204 px, 299 and 191 of 479."""
    given = Detection(0.7, (32.0, 32.0, 160.0, 160.0)), Detection(0.5, (352.0, 236.0, 480.0, 364.0))
    reward = load_reward(f"t2i_spatial:{tiny_owlv2}")
    monkeypatch.setattr(reward._scorers[0].__self__.detector, "detect", lambda images, pairs: [given] * len(pairs))
    assert reward.get_reward(noise(1, 512, 512), prompt).item() == pytest.approx(expected)


def test_score_is_the_same_alone_and_in_any_batch(folder, images):
    reward = load_reward(f"t2i_spatial:{folder}", detector_threshold=0.05)
    together = reward.get_reward(images, PROMPTS)
    alone = torch.cat([reward.get_reward(images[row : row + 1], PROMPTS[row]) for row in range(6)])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    shuffled = reward.get_reward(images[order], [PROMPTS[row] for row in order])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)
    torch.testing.assert_close(shuffled, together[order], atol=1e-4, rtol=0)
    torch.testing.assert_close(reward.get_reward(to_pil(images), PROMPTS), together, atol=1e-4, rtol=0)
    assert torch.equal(reward.get_reward(images, PROMPTS), together)


def test_extreme_input_has_a_score(folder):
    images = torch.stack([torch.zeros(3, 8, 300), torch.ones(3, 8, 300)])
    prompts = ["a 🚀 and 月 near a cat", "a cat near " + "old " * 600 + "castle"]
    scores = load_reward(f"t2i_spatial:{folder}").get_reward(images, prompts)
    assert scores.isfinite().all() and scores.min() >= 0 and scores.max() <= 1


def test_prompt_without_a_relation_has_no_score(tiny_owlv2, images):
    prompts = ["a cat next to a dog", "a cat and a dog", "next to a dog"]
    with pytest.raises(RewardError) as caught:
        load_reward(f"t2i_spatial:{tiny_owlv2}").get_reward(images[:3], prompts)
    message = str(caught.value)
    assert caught.value.rows == [1, 2] and "row 1: 'a cat and a dog'" in message and "\n" not in message
    assert "the reward t2i_spatial needs two things with one of the relations next to, near" in message
    lenient = load_reward(f"t2i_spatial:{tiny_owlv2}", failure="skip")
    scores = lenient.get_reward(images[:3], prompts)
    assert scores.isnan().tolist() == [False, True, True]
    assert torch.equal(scores[:1], lenient.get_reward(images[:1], prompts[:1]))
    assert lenient.get_reward(images[:1], prompts[1:2]).isnan().all()


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "word", "a/b/c"])
def test_missing_folder_is_refused(model):
    for spec, options, named in (
        (f"t2i_spatial:{model}", {}, f"--reward_model t2i_spatial:{model}"),
        ("t2i_spatial", {"detector": model}, f"--detector {model}"),
    ):
        with pytest.raises(UserError) as caught:
            load_reward(spec, **options)
        assert str(caught.value).startswith(f"{named}: there is no folder {model}; give")


@pytest.mark.parametrize("config", [None, "not json", '{"model_type": "owlvit"}'])
def test_folder_of_something_else_is_refused(config, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"holds no config.json of a Grounding DINO or OWLv2; give one that"):
        load_reward(f"t2i_spatial:{tmp_path}")


@pytest.mark.parametrize("name", ["IDEA-Research/grounding-dino-base", "google/owlv2-base-patch16-ensemble"])
def test_hub_out_of_reach_is_one_sentence(name):
    options = {} if name == "IDEA-Research/grounding-dino-base" else {"detector": name}
    with pytest.raises(UserError, match=f"--detector {name} could not be loaded") as caught:
        load_reward("t2i_spatial", **options)
    assert "check the name and the connection" in str(caught.value) and "\n" not in str(caught.value)


def without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)


def without_processor(folder):
    (folder / "processor_config.json").unlink()


def other_signs(folder):
    """Grounding DINO parts the things by the ids of BERT's signs."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["."], words["cat"] = words["cat"], words["."]
    path.write_text(json.dumps(tokenizer))


def without_some_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in sorted(weights) if "layers.1" in name)]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "kinds", "said"),
    [
        (without_tokenizer, KINDS, ""),
        (without_processor, KINDS, ""),
        (other_signs, KINDS[:1], "its tokenizer is not that of BERT"),
        (without_some_weights, KINDS, r"it lacks \d+ weights, "),
    ],
)
def test_incomplete_folder_is_refused(damage, kinds, said, request, tmp_path):
    for kind in kinds:
        folder = tmp_path / kind
        shutil.copytree(request.getfixturevalue(f"tiny_{kind}"), folder)
        load_reward(f"t2i_spatial:{folder}")
        damage(folder)
        with pytest.raises(UserError, match=f"--reward_model t2i_spatial:.*could not be loaded .*{said}") as caught:
            load_reward(f"t2i_spatial:{folder}")
        assert "\n" not in str(caught.value) and "give a folder that holds" in str(caught.value)
