"""What a reward receives, sums and their parts, and what becomes of a reward that fails."""

import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from reward import load_reward
from sharpening.rewards.calling import Reward, RewardError, RowsFailed
from sharpening.rewards.spec import Component
from tiny_world import shapes


def reward_of(scorer, name="mine"):
    return Reward([Component(name, 1.0, name)], [scorer])


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


def test_broken_image_is_kept_from_rewards_and_named_before_what_they_say():
    def strict(images, prompts):
        if not images.flatten(1).any(1).all():
            raise ValueError("nothing found")
        return images.mean((1, 2, 3))

    images = torch.rand(2, 3, 8, 8)
    images[1] = torch.nan
    component = load_reward("jpeg_compressibility").components
    total = Reward(component, [strict], "skip").get_reward(images, ["a", "b"])
    assert total[0].isfinite() and total[1].isnan()
    with pytest.raises(RewardError, match="was given 1 of 2 images with NaN"):
        Reward(component, [strict]).get_reward(images, ["a", "b"])


def test_images_are_let_go_while_a_grader_works():
    component = load_reward("jpeg_compressibility").components
    images = torch.rand(2, 3, 8, 8)
    seen = []

    def grader(given, prompts):
        seen.append(weakref.ref(given))
        return lambda: torch.zeros(len(prompts))

    wait = Reward(component, [grader]).begin(images, ["a", "b"])
    assert seen[0]() is None
    assert wait()[0].tolist() == [0, 0]
