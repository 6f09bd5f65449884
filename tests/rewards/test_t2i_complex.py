"""T2I-CompBench's 3-in-1 score against the scores that it is the mean of, on tiny random networks."""

import pytest
import torch

from reward import load_reward
from sharpening.errors import UserError
from sharpening.rewards.adjectives import without_adjectives
from tests.support.reward_inputs import noise
from tests.support.tiny_rewards import TINY

SPATIAL = ["The red hat is on top of the old castle.", "a cat next to a dog"]
ACTION = ["The old lamp was resting on the small boat.", "a red cube and a green house", ""]
BOTH = ["The warm cat sat next to the tall tree."]
PROMPTS = [*SPATIAL, *ACTION, *BOTH]


@pytest.fixture(scope="module")
def images():
    return noise(6, 64, 80)


@pytest.fixture(scope="module")
def options(tiny_blip_vqa, tiny_clip, tiny_grounding_dino):
    return {
        "detector": str(tiny_grounding_dino),
        "detector_threshold": 0.05,
        "t2i_complex_blip_vqa": str(tiny_blip_vqa),
        "t2i_complex_clip": f"{TINY}/{tiny_clip[0]}",
    }


@pytest.fixture(scope="module")
def reward(options):
    return load_reward("t2i_complex", **options)


def test_score_is_the_mean_of_what_the_prompt_asks_for(reward, options, images):
    scores, parts = reward.score(images, PROMPTS)
    spatial = load_reward("t2i_spatial", failure="skip", detector=options["detector"], detector_threshold=0.05)
    spatial = spatial.get_reward(images, PROMPTS)
    attribute = load_reward(f"blip_vqa:{options['t2i_complex_blip_vqa']}").get_reward(images, PROMPTS)
    clip = load_reward(f"clip_non_spatial:{options['t2i_complex_clip']}")
    action = clip.get_reward(images, [without_adjectives(prompt) for prompt in PROMPTS])
    expected = [
        *((attribute[row] + spatial[row]) / 2 for row in (0, 1)),
        *((attribute[row] + action[row]) / 2 for row in (2, 3, 4)),
        (attribute[5] + spatial[5] + action[5]) / 3,
    ]
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-4, rtol=0)
    assert spatial[[0, 1, 5]].max() > 0.5 and (action - clip.get_reward(images, PROMPTS)).abs().max() > 1e-3
    torch.testing.assert_close(parts["t2i_complex/blip_vqa"], attribute, atol=1e-4, rtol=0)
    assert parts["t2i_complex/spatial"].isnan().tolist() == [False, False, True, True, True, False]
    assert parts["t2i_complex/clip"].isnan().tolist() == [True, True, False, False, False, False]


def test_score_is_the_same_alone_and_in_any_batch(reward, images):
    together = reward.get_reward(images, PROMPTS)
    alone = torch.cat([reward.get_reward(images[row : row + 1], PROMPTS[row]) for row in range(6)])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    shuffled = reward.get_reward(images[order], [PROMPTS[row] for row in order])
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)
    torch.testing.assert_close(shuffled, together[order], atol=1e-4, rtol=0)
    assert together.isfinite().all() and together.min() >= -0.5 and together.max() <= 1


@pytest.mark.parametrize("flag", ["detector", "t2i_complex_blip_vqa", "t2i_complex_clip"])
def test_part_that_cannot_be_had_is_named(flag, options):
    with pytest.raises(UserError, match=f"^--{flag} word") as caught:
        load_reward("t2i_complex", **options | {flag: "word"})
    assert "\n" not in str(caught.value)
