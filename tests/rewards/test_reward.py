"""The reward interface, the spec grammar, and each entry of the catalogue against an independent reference."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reward import CATALOGUE, CLIPScoreReward, load_reward, parse_compositional, parse_reward_spec
from sharpening.errors import UserError
from sharpening.rewards.calling import Reward, RewardError, RowsFailed
from sharpening.rewards.spec import Component
from tests.support.tiny_rewards import TINY
from tiny_world import shapes

ROOT = Path(__file__).resolve().parents[2]

# Five lines, as the README shows them; then what else a user may bring.
MY_REWARD = """
def redness(images, prompts):
    red, green, blue = images.unbind(dim=1)
    return (red - (green + blue) / 2).mean(dim=(1, 2))

class Length:
    def __init__(self, device="unset"):
        self.device = device

    def get_reward(self, images, prompts):
        import torch
        return torch.tensor([len(prompt) for prompt in prompts])

class Plain:
    def get_reward(self, images, prompts):
        return images.mean(dim=(1, 2, 3))

class NeedsMore:
    def __init__(self, temperature):
        pass

class NoMethod:
    pass

ready = Length(device="made by the file")
number = 3
"""


@pytest.fixture
def my_reward(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(MY_REWARD)
    return path


def noise(count, height=48, width=48, seed=0):
    """Images `(B, 3, H, W)` whose values are whole 255ths, so that they survive a trip through PIL."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (images * 255).round() / 255


def to_pil(images):
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


def reward_of(scorer, name="mine"):
    return Reward([Component(name, 1.0, name)], [scorer])


# ---------------------------------------------------------------------------------------------------------- the spec


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("clip", [("clip", 1.0, "clip")]),
        (" shapes ", [("shapes", 1.0, "shapes")]),
        ("clip:0.01", [("clip", 0.01, "clip")]),
        ("clip:-2", [("clip", -2.0, "clip")]),
        ("clip:ViT-H-14", [("clip", 1.0, "clip", "ViT-H-14")]),
        ("clip:ViT-H-14/laion2b_s32b_b79k:0.5", [("clip", 0.5, "clip", "ViT-H-14/laion2b_s32b_b79k")]),
        ("clip:hf-hub:owner/name:-1", [("clip", -1.0, "clip", "hf-hub:owner/name")]),
        ("image_reward:some/where/it.pt", [("image_reward", 1.0, "image_reward", "some/where/it.pt")]),
        ("mllm:gpt-4o-mini:2,clip", [("mllm", 2.0, "mllm", "gpt-4o-mini"), ("clip", 1.0, "clip")]),
        ("clip:ViT-L-14,clip:ViT-H-14/x:2", [
            ("clip:ViT-L-14", 1.0, "clip", "ViT-L-14"), ("clip:ViT-H-14-x", 2.0, "clip", "ViT-H-14/x"),
        ]),
        ("clip : 1e-3 , shapes", [("clip", 1e-3, "clip"), ("shapes", 1.0, "shapes")]),
        ("{file}:redness", [("redness", 1.0, "{file}:redness")]),
        ("{file}:redness:0.5", [("redness", 0.5, "{file}:redness")]),
        ("{file}:inf", [("inf", 1.0, "{file}:inf")]),  # after a path the first part is always a name
        ("{file}:redness:2,jpeg_compressibility:0.1,{file}:Length", [
            ("redness", 2.0, "{file}:redness"),
            ("jpeg_compressibility", 0.1, "jpeg_compressibility"),
            ("Length", 1.0, "{file}:Length"),
        ]),
        ("tiny_world.shapes:score:3", [("score", 3.0, "tiny_world.shapes:score")]),
        ("json:loads", [("loads", 1.0, "json:loads")]),
    ],
)  # fmt: skip
def test_spec(spec, expected, my_reward):
    file = str(my_reward)
    parsed = parse_reward_spec(spec.format(file=file))
    assert parsed == [
        Component(name, weight, target.format(file=file), *model) for name, weight, target, *model in expected
    ]


def test_spec_with_relative_path_and_home(my_reward, monkeypatch):
    monkeypatch.chdir(my_reward.parent)
    monkeypatch.setenv("HOME", str(my_reward.parent))
    for spec in ("my_reward.py:redness", "./my_reward.py:redness", "~/my_reward.py:redness"):
        load_reward(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("clip,", "comma"),
        (",clip", "comma"),
        ("clip,,shapes", "comma"),
        ("clop", "did you mean clip?"),
        ("CLIP", "did you mean clip?"),
        ("jpeg", "jpeg_compressibility, shapes, or your own"),
        ("clip=0.5", "unknown"),
        ("0.5", "unknown"),
        ("0.5:clip", "unknown"),
        (":clip", "unknown"),
        ("clip:0", "weight 0"),
        ("clip:-0.0", "weight -0.0"),
        ("clip:nan", "weight nan"),
        ("clip:inf", "weight inf"),
        ("clip:-Infinity", "weight -Infinity"),
        ("clip:", "nothing is not a number"),
        ("clip::1", ":1 is not a number"),
        ("shapes:half", "half is not a number"),
        ("shapes:1:2", "1:2 is not a number"),
        ("clip,clip", "names clip 2 times"),
        ("clip:ViT-H-14,clip:ViT-H-14:2", "names clip:ViT-H-14 2 times"),
        ("clip:1,shapes,clip:2", "names clip 2 times"),
        ("{file}:redness,{file}:redness:2", "names redness 2 times"),
        ("{file}", "which function or class"),
        ("{file}:", "which function or class"),
        ("{file}:0.5", "which function or class"),
        ("{file}:redness:", "nothing is not a number"),
        ("{file}:redness:x", "x is not a number"),
        ("{file}:redness:0", "weight 0"),
        ("{file}:redness:1:2", "1:2 is not a number"),
        ("./nowhere.py:redness", "there is no file ./nowhere.py"),
        ("nowhere.py:redness", "there is no file nowhere.py"),
        ("{folder}:redness", "there is no file"),
        ("no_such_package.rewards:Redness", "finds no module no_such_package.rewards"),
        ("clop:redness", "did you mean clip?"),
        ("my-module:redness", "unknown"),
        ("folder/without_a_name", "which function or class"),
        ("tiny_world.shapes", "which function or class"),
    ],
)
def test_bad_spec_is_one_sentence_naming_the_flag(spec, said, my_reward):
    with pytest.raises(UserError) as caught:
        parse_reward_spec(spec.format(file=my_reward, folder=my_reward.parent))
    message = str(caught.value)
    assert message.startswith("--reward_model") and said in message and "\n" not in message


def test_spec_is_parsed_without_heavy_imports(my_reward):
    program = f"""
import sys
import reward
reward.parse_reward_spec("clip:0.1,shapes,{my_reward}:redness,torch.nn:Module")
heavy = {{"torch", "open_clip", "torchvision", "transformers", "numpy", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# --------------------------------------------------------------------------------------------------- a user's rewards


def test_user_function_class_and_object(my_reward):
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0] = 1.0
    images[1, 2] = 1.0
    prompts = ["a", "four"]
    assert load_reward(f"{my_reward}:redness").get_reward(images, prompts).tolist() == [1.0, -0.5]
    total = load_reward(f"{my_reward}:Length").get_reward(images, prompts)  # integers become float32
    assert total.dtype == torch.float32 and total.device.type == "cpu" and total.tolist() == [1.0, 4.0]
    assert load_reward(f"{my_reward}:ready").get_reward(images, prompts).tolist() == [1.0, 4.0]
    torch.testing.assert_close(load_reward(f"{my_reward}:Plain").get_reward(images, prompts), torch.full((2,), 1 / 3))


def test_user_class_gets_the_device_it_asks_for(my_reward):
    reward = load_reward(f"{my_reward}:Length", device="meta")
    assert reward._scorers[0].__self__.device == "meta"


def test_user_module(my_reward, monkeypatch):
    package = my_reward.parent / "my_rewards_package"
    package.mkdir()
    (package / "__init__.py").touch()
    my_reward.rename(package / "colours.py")
    monkeypatch.syspath_prepend(str(package.parent))
    importlib.invalidate_caches()
    reward = load_reward("my_rewards_package.colours:redness:2")
    assert reward.get_reward(torch.ones(1, 3, 4, 4), ["x"]).tolist() == [0.0]
    assert reward.components == [Component("redness", 2.0, "my_rewards_package.colours:redness")]


def test_what_a_user_reward_receives():
    seen = {}

    def spy(images, prompts):
        seen.update(images=images.clone(), prompts=list(prompts))
        images.zero_()
        prompts.clear()
        return images.new_ones(len(images))

    mine = torch.rand(2, 3, 4, 6, requires_grad=True)
    prompts = ["a", "b"]
    out = reward_of(spy).get_reward(mine, prompts)
    assert seen["images"].shape == (2, 3, 4, 6) and seen["images"].dtype == torch.float32
    assert not seen["images"].requires_grad and not out.requires_grad
    assert prompts == ["a", "b"] and mine.abs().sum() > 0  # the caller's own are untouched
    reward_of(spy).get_reward(mine.double().half(), prompts)
    assert seen["images"].dtype == torch.float32
    picture = Image.fromarray(np.full((4, 6, 4), 51, dtype=np.uint8), "RGBA")
    reward_of(spy).get_reward(picture, "one")
    assert seen["images"].shape == (1, 3, 4, 6) and seen["prompts"] == ["one"]
    torch.testing.assert_close(seen["images"], torch.full((1, 3, 4, 6), 0.2))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{file}:rednes", "holds no rednes (did you mean redness?)"),
        ("{file}:number", "neither a function nor has it a method get_reward"),
        ("{file}:NoMethod", "neither a function nor has it a method get_reward"),
        ("{file}:NeedsMore", "temperature"),
        ("{broken}:redness", "SyntaxError"),
        ("{lacking}:redness", "No module named 'no_such_module'"),
        ("json.no_such_submodule:redness", "No module named 'json.no_such_submodule'"),
        ("json:no_such_name", "holds no no_such_name"),
    ],
)
def test_bad_user_reward_is_one_sentence_naming_the_flag(spec, said, my_reward):
    broken, lacking = my_reward.with_name("broken.py"), my_reward.with_name("lacking.py")
    broken.write_text("def redness(:\n")
    lacking.write_text("import no_such_module\n")
    with pytest.raises(UserError) as caught:
        load_reward(spec.format(file=my_reward, broken=broken, lacking=lacking))
    message = str(caught.value)
    assert message.startswith("--reward_model") and said in message and "\n" not in message


# ------------------------------------------------------------------------------------------------- sums and failures


def test_weighted_sum_and_components_from_one_call_each():
    calls = []

    def first(images, prompts):
        calls.append("first")
        return images.mean(dim=(1, 2, 3))

    def second(images, prompts):
        calls.append("second")
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    reward = Reward([Component("first", 10.0, ""), Component("second", -0.5, "")], [first, second])
    images = torch.stack([torch.full((3, 4, 4), 0.25), torch.full((3, 4, 4), 0.75)])
    total, components = reward.score(images, ["ab", "abcd"])
    assert calls == ["first", "second"]
    assert list(components) == ["first", "second"]
    assert components["first"].tolist() == [0.25, 0.75] and components["second"].tolist() == [2.0, 4.0]
    assert total.tolist() == [1.5, 5.5] and total.dtype == torch.float32
    assert torch.equal(reward.get_reward(images, ["ab", "abcd"]), total)
    assert torch.equal(reward.get_components(images, ["ab", "abcd"])["first"], components["first"])


def test_sum_over_the_catalogue():
    captions = shapes.training_captions()[:3]
    rng = np.random.default_rng(0)
    images = [shapes.draw(caption, rng) for caption in captions]
    total, components = load_reward("shapes:2,jpeg_compressibility:0.25").score(images, captions)
    torch.testing.assert_close(total, 2 * components["shapes"] + 0.25 * components["jpeg_compressibility"])
    assert components["shapes"].min() > 0.8


@pytest.mark.parametrize(
    ("returned", "said", "rows"),
    [
        (lambda: torch.tensor([1.0, float("nan"), 2.0]), "returned nan for 1 of 3 images", [1]),
        (lambda: torch.tensor([float("inf"), 0.0, -float("inf")]), "returned inf, -inf for 2 of 3", [0, 2]),
        (lambda: torch.tensor([1e300, 0.0, 0.0], dtype=torch.float64), "returned inf", [0]),
        (lambda: torch.zeros(3, 1), "torch.float32 (3, 1) instead of real numbers of shape (3,)", [0, 1, 2]),
        (lambda: torch.zeros(2), "(2,) instead of", [0, 1, 2]),
        (lambda: torch.tensor(1.0), "() instead of", [0, 1, 2]),
        (lambda: torch.zeros(3, dtype=torch.complex64), "complex64", [0, 1, 2]),
        (lambda: [1.0, 2.0, 3.0], "returned a list instead of a torch.Tensor", [0, 1, 2]),
        (lambda: None, "returned a NoneType", [0, 1, 2]),
        (lambda: {}["missing"], "failed with KeyError: 'missing'", [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
def test_bad_result_names_reward_rows_and_prompts(returned, said, rows, waits):
    prompts = ["a cat", "a dog", "a cow"]
    reward = reward_of(lambda images, prompts: returned if waits else returned(), name="moody")
    with pytest.raises(RewardError) as caught:
        reward.score(torch.zeros(3, 3, 4, 4), prompts)
    error = caught.value
    assert (error.reward, error.rows, error.prompts) == ("moody", rows, [prompts[row] for row in rows])
    message = str(error)
    assert "the reward moody " in message and said in message and "\n" not in message
    for row in rows:
        assert f"row {row}: '{prompts[row]}'" in message
    assert ("KeyError" in said) == isinstance(error.__cause__, KeyError)


def test_reward_that_waits_has_begun_and_the_others_have_ended_before_it_is_waited_for():
    events = []

    def slow(images, prompts):
        events.append("slow begins")
        return lambda: events.append("slow ends") or torch.full((len(prompts),), 2.0)

    def quick(images, prompts):
        events.append("quick")
        return images.mean((1, 2, 3))

    reward = Reward([Component("slow", 1.0, ""), Component("quick", 10.0, "")], [slow, quick])
    wait = reward.begin(torch.ones(2, 3, 4, 4), ["a", "b"])
    assert events == ["slow begins", "quick"]
    total, values = wait()
    assert events[2:] == ["slow ends"] and total.tolist() == [12, 12]
    assert {name: value.tolist() for name, value in values.items()} == {"slow": [2, 2], "quick": [1, 1]}


def test_many_bad_rows_are_summarized():
    prompts = [f"prompt {row}" for row in range(20)]
    with pytest.raises(RewardError, match="row 7: 'prompt 7'; and 12 more") as caught:
        reward_of(lambda images, prompts: 1 / 0).score(torch.zeros(20, 3, 4, 4), prompts)
    assert caught.value.prompts == prompts


def test_weights_beyond_float32():
    reward = Reward([Component("mine", 1e39, "")], [lambda images, prompts: torch.tensor([0.5, 2.0])])
    with pytest.raises(RewardError, match="beyond float32"):
        reward.get_reward(torch.zeros(2, 3, 4, 4), ["a", "b"])


@pytest.mark.parametrize(
    ("images", "prompts"),
    [
        (torch.zeros(3, 8, 8), ["a"]),
        (torch.zeros(1, 8, 8, 3), ["a"]),
        (torch.zeros(1, 4, 8, 8), ["a"]),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"]),
        (torch.zeros(2, 3, 8, 8), ["a"]),
        (torch.zeros(2, 3, 8, 8), "a"),
        (torch.zeros(2, 3, 8, 8), ["a", None]),
        (torch.zeros(0, 3, 8, 8), []),
        ([], []),
        ([np.zeros((8, 8, 3))], ["a"]),
        ([Image.new("RGB", (8, 8))], ["a", "b"]),
    ],
)
def test_malformed_input(images, prompts):
    with pytest.raises(ValueError):
        reward_of(lambda images, prompts: torch.zeros(len(images))).score(images, prompts)


def test_images_of_several_sizes_keep_their_rows():
    images = [Image.new(mode, size, 255) for mode, size in (("L", (8, 8)), ("RGB", (4, 6)), ("L", (8, 8)))]
    prompts = ["one", "two", "three"]
    calls = []

    def spy(images, prompts):
        calls.append(tuple(images.shape))
        return torch.tensor([float("nan") if prompt == "three" else float(len(prompt)) for prompt in prompts])

    with pytest.raises(RewardError) as caught:
        reward_of(spy).score(images, prompts)
    assert caught.value.rows == [2] and caught.value.prompts == ["three"]
    assert reward_of(spy).get_reward(images, ["one", "three?", "fives"]).tolist() == [3.0, 6.0, 5.0]
    assert calls[-2:] == [(2, 3, 8, 8), (1, 3, 6, 4)]


# ------------------------------------------------------------------------------------------------ weightless entries


def test_jpeg_compressibility(tmp_path):
    images = torch.cat([noise(2, 64, 80), torch.rand(1, 3, 64, 80).mul(255).round() / 255, torch.ones(1, 3, 64, 80)])
    scores = load_reward("jpeg_compressibility").get_reward(images, ["x"] * 4)
    for score, image in zip(scores, to_pil(images), strict=True):
        image.save(tmp_path / "image.jpg", quality=95)
        assert score.item() == pytest.approx(-(tmp_path / "image.jpg").stat().st_size / 1000)
    assert scores[2] < scores[0] < scores[3] < 0  # noise compresses worst, a blank best
    assert torch.equal(load_reward("jpeg_compressibility").get_reward(to_pil(images), ["x"] * 4), scores)


def test_shapes():
    captions = shapes.training_captions()[:4]
    rng = np.random.default_rng(1)
    pictures = [shapes.draw(caption, rng) for caption in captions]
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255
    reward = load_reward("shapes")
    direct = shapes.score(np.stack([np.asarray(picture) for picture in pictures]) / 255, captions)
    np.testing.assert_allclose(reward.get_reward(images, captions).numpy(), direct, atol=1e-6)
    np.testing.assert_allclose(reward.get_reward(pictures, captions).numpy(), direct, atol=1e-6)
    with pytest.raises(RewardError, match=r"the reward shapes failed with ValueError.*a unicorn"):
        reward.get_reward(images, [*captions[:3], "a unicorn"])


# -------------------------------------------------------------------------------------------------------------- CLIP

PROMPTS = ["a red circle", "two dogs on a beach, oil painting", "", "a red circle"]


def directly(model, preprocess, pictures, prompts):
    """100 x cosine with nothing but open_clip's own calls, one pair at a time."""
    import open_clip

    tokenize = open_clip.get_tokenizer(TINY)
    scores = []
    with torch.no_grad():
        for picture, prompt in zip(pictures, prompts, strict=True):
            image = model.encode_image(preprocess(picture)[None], normalize=True)
            text = model.encode_text(tokenize([prompt]), normalize=True)
            scores.append(100 * (image @ text.T).item())
    return torch.tensor(scores)


def test_clip_equals_open_clip(tiny_clip):
    weights, model, preprocess = tiny_clip
    images = noise(4, 224, 224)
    expected = directly(model, preprocess, to_pil(images), PROMPTS)
    assert expected.std() > 1  # scores that are all alike would agree with anything
    reward = load_reward("clip", clip_model=f"{TINY}/{weights}")
    scores = reward.get_reward(images, PROMPTS)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(reward.get_reward(to_pil(images), PROMPTS), scores, atol=1e-4, rtol=0)
    alone = torch.cat([reward.get_reward(images[row : row + 1], PROMPTS[row]) for row in range(4)])
    torch.testing.assert_close(alone, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 460), (64, 32)])
def test_clip_resizes_and_crops_as_published(height, width, tiny_clip):
    weights, _, preprocess = tiny_clip
    images = noise(2, height, width)
    ours = CLIPScoreReward(f"{TINY}/{weights}").clip.preprocess(images)
    published = torch.stack([preprocess(picture) for picture in to_pil(images)])
    assert ours.shape == (2, 3, 224, 224)
    # PIL rounds to 1/255 after each of its two passes; a standard deviation is about 0.26.
    assert (ours - published).abs().max() < 2.5 / 255 / 0.26


def test_clip_resize_stays_in_range(tiny_clip):
    images = torch.zeros(1, 3, 100, 100)
    images[..., 50:] = 1.0
    reward = CLIPScoreReward(f"{TINY}/{tiny_clip[0]}")
    mean, std = (torch.tensor(reward.clip.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    restored = reward.clip.preprocess(images) * std + mean
    assert restored.min() > -1e-6 and restored.max() < 1 + 1e-6


def test_clip_cuts_at_77_tokens(tiny_clip):
    reward = load_reward("clip", clip_model=f"{TINY}/{tiny_clip[0]}")
    images = noise(1).expand(3, -1, -1, -1)
    fits = "cat " * 75  # and the two tokens for start and end
    scores = reward.get_reward(images, [fits, fits + "and a dog", "cat " * 74])
    assert scores[0] == scores[1] and scores[0] != scores[2]


def test_clip_ignores_autocast(tiny_clip):
    reward = load_reward("clip", clip_model=f"{TINY}/{tiny_clip[0]}")
    images = noise(4)
    plain = reward.get_reward(images, PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward.get_reward(images, PROMPTS), plain)


def uses_quick_gelu(reward):
    (activation,) = {type(block.mlp.gelu).__name__ for block in reward.clip.model.visual.transformer.resblocks}
    return activation == "QuickGELU"


def test_clip_activation_follows_the_weights(tiny_clip, monkeypatch, recwarn):
    """OpenAI's weights need QuickGELU; open_clip builds `ViT-L-14` with GELU and only warns."""
    import open_clip

    assert open_clip.get_pretrained_cfg("ViT-L-14", "openai")["quick_gelu"]
    weights = str(tiny_clip[0])
    tags = {"openai": {"file": weights, "quick_gelu": True}, "laion": {"file": weights}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, TINY, tags)
    assert uses_quick_gelu(CLIPScoreReward(f"{TINY}/openai"))
    assert uses_quick_gelu(CLIPScoreReward(TINY))  # a name alone means its openai weights
    assert not uses_quick_gelu(CLIPScoreReward(f"{TINY}/laion"))
    assert uses_quick_gelu(CLIPScoreReward(f"{TINY}-quickgelu/{weights}"))
    assert not uses_quick_gelu(CLIPScoreReward(f"{TINY}/{weights}"))
    assert not [warning for warning in recwarn if "QuickGELU" in str(warning.message)]


def test_clip_from_a_local_folder(tiny_clip, tmp_path):
    weights, model, preprocess = tiny_clip
    config = {"model_cfg": json.loads((weights.parent / f"{TINY}.json").read_text()), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(weights.read_bytes())
    images = noise(4, 224, 224)
    scores = load_reward("clip", clip_model=f"local-dir:{tmp_path}").get_reward(images, PROMPTS)
    torch.testing.assert_close(scores, directly(model, preprocess, to_pil(images), PROMPTS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("clip_model", "said"),
    [
        ("ViT-L14/openai", "did you mean ViT-L-14?"),
        ("./weights.pt", "write NAME/WEIGHTS"),
        ("ViT-H-14/openai", "openai is neither an existing file nor the name of weights for ViT-H-14; open_clip has"),
        ("ViT-L-14/nowhere/weights.pt", "nowhere/weights.pt is neither"),
        ("ViT-B-32/{weights}", "must be an open_clip state dict of ViT-B-32"),
        (TINY + "/{junk}", "must be an open_clip state dict"),
        ("local-dir:/nowhere", "--clip_model local-dir:/nowhere could not be loaded"),
        ("local-dir:{empty}", "could not be loaded"),
    ],
)
def test_bad_clip_model(clip_model, said, tiny_clip, tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError) as caught:
        load_reward(
            "clip", clip_model=clip_model.format(weights=tiny_clip[0], junk=tmp_path / "junk.pt", empty=tmp_path)
        )
    message = str(caught.value)
    assert "--clip_model" in message and said in message and "\n" not in message


def test_clip_weights_that_cannot_be_downloaded(monkeypatch):
    import open_clip

    asked = {}

    def offline(*args, **kwargs):
        asked.update(kwargs)
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    with pytest.raises(UserError) as caught:
        load_reward("clip", cache_dir="elsewhere")
    assert asked == {"cache_dir": "elsewhere"}
    message = str(caught.value)
    assert "--clip_model ViT-L-14/openai" in message
    assert "Name or service not known" in message and "give their path" in message and "\n" not in message


# ------------------------------------------------------------------------------------- other rewards built on CLIP


def test_clip_with_a_model_named_in_the_spec(tiny_clip):
    weights, model, preprocess = tiny_clip
    images = noise(4, 224, 224)
    expected = directly(model, preprocess, to_pil(images), PROMPTS)
    total, components = load_reward(f"clip:{TINY}/{weights}:0.5", clip_model="ViT-L-14/openai").score(images, PROMPTS)
    torch.testing.assert_close(components["clip"], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(total, expected / 2, atol=1e-4, rtol=0)
    twice = load_reward(f"clip:{TINY}/{weights},clip:{TINY}-quickgelu/{weights}").get_components(images, PROMPTS)
    assert [name.partition("/")[0].split("-tmp")[0] for name in twice] == [f"clip:{TINY}-", f"clip:{TINY}-quickgelu-"]


def test_model_without_weights_means_those_that_open_clip_lists_first(monkeypatch):
    from sharpening.rewards.clip import parse_name

    assert parse_name("--clip_model", "ViT-L-14") == ("ViT-L-14", "openai")
    assert parse_name("--clip_model", "ViT-H-14") == ("ViT-H-14", "laion2b_s32b_b79k")


@pytest.mark.parametrize(("height", "width"), [(224, 224), (224, 100), (512, 512), (300, 460), (460, 300)])
def test_hpsv2_is_the_cosine_of_the_padded_image(height, width, tiny_clip):
    import open_clip

    weights, model, _ = tiny_clip
    preprocess = open_clip.image_transform(224, is_train=False, resize_mode="longest", interpolation="bicubic")
    images = noise(4, height, width)
    reward = load_reward(f"hpsv2:{TINY}={weights}")
    if max(height, width) == 224:  # nothing is resized, so nothing is rounded
        scores = reward.get_reward(images, PROMPTS)
        expected = directly(model, preprocess, to_pil(images), PROMPTS) / 100
        torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
        assert scores.std() > 0.01
    ours = reward._scorers[0].__self__.clip.preprocess(images, "longest")
    published = torch.stack([preprocess(picture) for picture in to_pil(images)])
    assert (ours - published).abs().max() < 2.5 / 255 / 0.26


def test_hpsv2_reads_the_published_wrapping(tiny_clip, tmp_path):
    weights, *_ = tiny_clip
    torch.save({"epoch": 3, "state_dict": torch.load(weights)}, tmp_path / "HPS_v2.1_compressed.pt")
    images = noise(4, 224, 224)
    wrapped = load_reward(f"hpsv2:{TINY}={tmp_path}").get_reward(images, PROMPTS)
    torch.testing.assert_close(wrapped, load_reward(f"hpsv2:{TINY}={weights}").get_reward(images, PROMPTS))


def test_aesthetic_is_the_published_stack_of_layers_on_the_unit_embedding(tiny_clip, aesthetic_head):
    weights, model, preprocess = tiny_clip
    images = noise(3, 224, 224)
    with torch.no_grad():
        features = torch.cat([model.encode_image(preprocess(picture)[None]) for picture in to_pil(images)])
    value = features / features.norm(dim=-1, keepdim=True)
    head = torch.load(aesthetic_head)
    for index in (0, 2, 4, 6, 7):
        value = value @ head[f"layers.{index}.weight"].T + head[f"layers.{index}.bias"]
    for name in (aesthetic_head, aesthetic_head.parent):
        reward = load_reward(f"aesthetic:{name}", aesthetic_clip=f"{TINY}/{weights}")
        scores = reward.get_reward(images, ["x", "y", "z"])
        torch.testing.assert_close(scores, value[:, 0], atol=1e-4, rtol=1e-4)
    assert scores.std() > 0.01
    torch.testing.assert_close(reward.get_reward(images, ["other", "", "z"]), scores)  # the prompt plays no part


def test_aesthetic_refuses_another_file(tiny_clip, tmp_path):
    torch.save({"layers.0.weight": torch.ones(1, 32)}, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"aesthetic:.*part\.pth is not that predictor"):
        load_reward(f"aesthetic:{tmp_path}/part.pth", aesthetic_clip=f"{TINY}/{tiny_clip[0]}")


def test_pickscore_is_the_published_formula(tiny_pickscore):
    from transformers import AutoModel, AutoProcessor

    images = noise(4, 224, 224)
    model, processor = AutoModel.from_pretrained(tiny_pickscore), AutoProcessor.from_pretrained(tiny_pickscore)
    expected = []
    for picture, prompt in zip(to_pil(images), PROMPTS, strict=True):
        inputs = processor(
            images=picture, text=prompt, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.no_grad():
            expected.append(model(**inputs).logits_per_image.item())
    reward = load_reward(f"pickscore:{tiny_pickscore}")
    scores = reward.get_reward(images, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=0)
    assert scores.std() > 0.1
    alone = torch.cat([reward.get_reward(images[row : row + 1], PROMPTS[row]) for row in range(4)])
    torch.testing.assert_close(alone, scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(reward.get_reward(to_pil(images), PROMPTS), scores, atol=1e-4, rtol=0)


def test_pickscore_without_its_tokenizer_is_refused(tiny_pickscore, tmp_path):
    """transformers would tokenize every prompt alike."""
    shutil.copytree(tiny_pickscore, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="its tokenizer has no vocabulary"):
        load_reward(f"pickscore:{tmp_path}/model")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("pickscore:/nowhere", "--reward_model pickscore:/nowhere could not be loaded"),
        ("pickscore", "could not be loaded"),
        ("hpsv2", "HPS_v2.1_compressed.pt of xswu/HPSv2 could not be had from the hub"),
        ("hpsv2:./nowhere.pt", "there is no file ./nowhere.pt"),
        ("aesthetic", "of camenduru/improved-aesthetic-predictor could not be had from the hub"),
        ("aesthetic:{folder}", "holds no sac+logos+ava1-l14-linearMSE.pth"),
        ("aesthetic:{folder}/junk.pt", "junk.pt is not a checkpoint"),
        ("aesthetic:{folder}/list.pt", "list.pt holds no state dict"),
        ("image_reward", "ImageReward.pt of THUDM/ImageReward could not be had from the hub"),
        ("image_reward:word", "there is no file word"),
        ("compositional", "--compositional_models attribute=PATH,spatial=PATH,non_spatial=PATH"),
    ],
)
def test_checkpoint_that_cannot_be_had_is_one_sentence(spec, said, tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError) as caught:
        load_reward(spec.format(folder=tmp_path))
    message = str(caught.value)
    assert "--reward_model" in message and said in message and "\n" not in message


def test_checkpoint_never_runs_code(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_reward(f"aesthetic:{tmp_path}/evil.pt")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------- parts, skipping, options


def test_parts_of_a_reward_are_reported_beside_it():
    def both(images, prompts):
        return images.mean((1, 2, 3)), {"height": torch.full((len(prompts),), 4.0)}

    reward = Reward([Component("mine", 2.0, "")], [both])
    total, values = reward.score(torch.ones(2, 3, 4, 4), ["a", "b"])
    assert total.tolist() == [2.0, 2.0]
    assert {name: value.tolist() for name, value in values.items()} == {"mine": [1.0, 1.0], "mine/height": [4.0, 4.0]}
    for wrong in ((torch.zeros(2), {"x": torch.zeros(3)}), (torch.zeros(2), [1.0]), (torch.zeros(2), {"x": 1.0})):
        with pytest.raises(RewardError, match="instead of"):
            reward_of(lambda images, prompts, wrong=wrong: wrong).score(torch.ones(2, 3, 4, 4), ["a", "b"])


def test_skipping_leaves_failed_rows_without_a_score_and_keeps_the_others(caplog):
    def moody(images, prompts):
        return torch.tensor([1.0, float("nan"), float("inf")])

    def partial(images, prompts):
        raise RowsFailed(torch.tensor([float("nan"), 2.0, 3.0]), {0: "the server slept"})

    images, prompts = torch.zeros(3, 3, 4, 4), ["a", "b", "c"]
    components = [Component("moody", 1.0, ""), Component("partial", 10.0, "")]
    total, values = Reward(components, [moody, partial], "skip").score(images, prompts)
    assert total.isnan().all()
    assert values["moody"][0] == 1 and values["moody"][1:].isnan().all()
    assert values["partial"][0].isnan() and values["partial"][1:].tolist() == [2.0, 3.0]
    assert "returned nan, inf for 2 of 3 images" in caplog.text and "the server slept for 1 of 3" in caplog.text
    with pytest.raises(RewardError, match="the server slept for 1 of 3 images") as caught:
        Reward(components[1:], [partial]).score(images, prompts)
    assert caught.value.rows == [0]
    with pytest.raises(RewardError, match="ZeroDivisionError"):  # a mistake in a reward is not a failed image
        Reward(components[:1], [lambda images, prompts: 1 / 0], "skip").score(images, prompts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_image_of_broken_pixels_has_no_score_from_any_reward(bad, caplog):
    """As 8-bit pixels NaN is black, which compresses best of all."""
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle on a white background"] * 3
    whole = load_reward("jpeg_compressibility,shapes").get_reward(images, prompts)
    images[1, 0, 0, 0] = bad
    with pytest.raises(RewardError, match="was given 1 of 3 images with NaN or infinite pixels") as caught:
        load_reward("jpeg_compressibility").get_reward(images, prompts)
    assert caught.value.rows == [1]
    total, parts = load_reward("jpeg_compressibility,shapes", failure="skip").score(images, prompts)
    assert total.isnan().tolist() == [False, True, False] and torch.equal(total[::2], whole[::2])
    assert all(part.isnan().tolist() == [False, True, False] for part in parts.values())
    assert "left out of selection" in caplog.text
    assert load_reward("shapes", failure="skip").get_reward(images[1:2], prompts[:1]).isnan().all()


def test_path_may_hold_an_equals_sign():
    assert parse_compositional("a=/x/lr=1e-5/m.pt,b=y.pt", "1,2") == (
        [1.0, 2.0],
        {"a": "/x/lr=1e-5/m.pt", "b": "y.pt"},
    )
    assert parse_compositional("/x/lr=1e-5/m.pt", None) == ([1.0], {"": "/x/lr=1e-5/m.pt"})
    with pytest.raises(UserError, match="--compositional_weights nan"):
        parse_compositional("a=x,b=y", "nan,1")


def test_flags_reach_the_entry_whose_name_they_begin_with(monkeypatch):
    import reward as module

    seen = {}

    class Entry:
        def __init__(self, model="default", colour="red", cache_dir=None, base_url=None):
            seen.update(model=model, colour=colour, cache_dir=cache_dir, base_url=base_url)

        def get_reward(self, images, prompts):
            return torch.zeros(len(prompts))

    monkeypatch.setitem(module.CATALOGUE, "entry", Entry)
    load_reward("entry", entry_colour="blue", clip_model="x", cache_dir="here", base_url=None)
    assert seen == {"model": "default", "colour": "blue", "cache_dir": "here", "base_url": None}
    load_reward("entry:a/b:0.5", entry_model="loses")
    assert seen["model"] == "a/b"
    with pytest.raises(TypeError, match="entry_size"):
        load_reward("entry", entry_size=3)


def test_every_entry_is_documented():
    for name, entry in CATALOGUE.items():
        assert "Range: " in entry.__doc__, name
