"""`--reward_dtype`: what the networks of rewards compute in, and what that changes of their scores."""

import csv
import json
import math
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reward import cli, load_reward
from tests.support.reward_inputs import noise, to_pil
from tests.support.tiny_rewards import TINY

CAPTIONS = ["a red circle", "two dogs on a beach", "a blue vase and a green bench", "a red circle"]
RELATED = ["a cat next to a dog", "a house near a river", "a cat sat near a dog", "a fish on side of a bird"]
WITH_WEIGHTS = ("convolution", "addmm", "mm", "linear", "embedding", "native_layer_norm")
HEADS = {"aesthetic", "image_reward", "compositional"}  # their last few layers stay in float32
# Of float32's scores, as a share of their largest magnitude. These random networks differ by at most 0.086 and 0.013.
TOLERANCE = {"bfloat16": 0.2, "float16": 0.03}


class WeightsSeen(TorchDispatchMode):
    """The dtypes that operators with weights run in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator.overloadpacket.__name__ in WITH_WEIGHTS:
            tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
            self.dtypes |= {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        return operator(*arguments, **(keywords or {}))


@pytest.fixture(
    params=[
        "clip", "clip_non_spatial", "pickscore", "hpsv2", "aesthetic", "image_reward", "compositional", "blip_vqa",
        "t2i_spatial", "t2i_spatial owlv2", "t2i_complex",
    ]
)  # fmt: skip
def loaded(request):
    """Load one reward with a tiny network in a dtype."""
    name, _, detector = request.param.partition(" ")
    weights = request.getfixturevalue("tiny_clip")[0]
    if name.startswith("t2i_"):
        options = {
            "detector": str(request.getfixturevalue(f"tiny_{detector or 'grounding_dino'}")),
            "detector_threshold": 0.01,
            "t2i_complex_blip_vqa": str(request.getfixturevalue("tiny_blip_vqa")),
            "t2i_complex_clip": f"{TINY}/{weights}",
        }
        return name, lambda dtype: load_reward(name, dtype=dtype, **options)
    own = {"pickscore": "tiny_pickscore", "blip_vqa": "tiny_blip_vqa", "aesthetic": "aesthetic_head"}
    own |= dict.fromkeys(("image_reward", "compositional"), "tiny_image_reward")
    model = request.getfixturevalue(own[name]) if name in own else f"{TINY}/{weights}"
    model = f"{TINY}={weights}" if name == "hpsv2" else model

    def load(dtype):
        return load_reward(f"{name}:{model}", dtype=dtype, aesthetic_clip=f"{TINY}/{weights}")

    return name, load


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_networks_compute_in_the_dtype_and_score_nearly_alike(loaded, dtype):
    name, load = loaded
    images, captions = noise(4, 96, 96), CAPTIONS
    if name.startswith("t2i_"):  # 64 px: OWLv2's preprocessing blurs what it makes smaller, in float32
        images, captions = noise(4, 64, 64), RELATED
    scores = {}
    for each in (None, dtype):
        reward = load(each)
        with WeightsSeen() as seen:
            scores[each] = reward.get_reward(images, captions)
        wanted = {torch.float32} if each is None else {getattr(torch, dtype)}
        assert seen.dtypes == (wanted | {torch.float32} if name in HEADS else wanted)
    full, half = scores[None], scores[dtype]
    assert half.dtype == torch.float32 and half.isfinite().all()
    tolerance = TOLERANCE[dtype] * (2 if name.startswith("t2i_") else 1)  # another box can be the best
    assert 0 < (half - full).abs().max() / full.abs().max() < tolerance


def test_factor_of_pickscore_is_not_rounded_with_its_weights(tiny_pickscore, tmp_path):
    """Projections of ones make embeddings whose numbers are all equal: the cosine is 1 or -1, the score the factor."""
    from transformers import CLIPModel

    shutil.copytree(tiny_pickscore, tmp_path, dirs_exist_ok=True)
    model = CLIPModel.from_pretrained(tmp_path)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
        for tower in (model.visual_projection, model.text_projection):
            tower.weight.fill_(1)
    model.save_pretrained(tmp_path)
    scores = load_reward(f"pickscore:{tmp_path}", dtype=torch.bfloat16).get_reward(noise(4, 96, 96), CAPTIONS)
    torch.testing.assert_close(scores.abs(), torch.full((4,), 100.0), rtol=1e-5, atol=0)


def test_command_scores_in_the_dtype(tiny_clip, tmp_path):
    spec = f"clip:{TINY}/{tiny_clip[0]}"
    images = to_pil(noise(4))
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    output = tmp_path / "scores.csv"
    paths = [f"--images={tmp_path}", f"--prompts={tmp_path}/prompts.txt", f"--output={output}", "--device=cpu"]
    assert cli([f"--reward_model={spec}", "--reward_dtype=bfloat16", *paths]) == 0
    with output.open() as file:
        scores = torch.tensor([float(row["reward"]) for row in csv.DictReader(file)])
    torch.testing.assert_close(scores, load_reward(spec, dtype=torch.bfloat16).get_reward(images, CAPTIONS))
    assert (scores - load_reward(spec).get_reward(images, CAPTIONS)).abs().max() > 0.01


DTYPE_ITSELF = """
class Itself:
    def __init__(self, dtype=None):
        self.bits = 32.0 if dtype is None else dtype.itemsize * 8.0

    def get_reward(self, images, prompts):
        return images.new_full((len(images),), self.bits)
"""


def test_run_hands_the_dtype_to_its_reward(train, flags, no_result, tmp_path):
    """A reward of a user's own that asks for it stands for all: the others get it in the same way."""
    (tmp_path / "mine.py").write_text(DTYPE_ITSELF)
    spec = f"{tmp_path}/mine.py:Itself"
    assert train(flags(reward_model=spec, reward_dtype="float16", max_train_steps=1)) == 0
    with (tmp_path / "run" / "metrics.jsonl").open() as file:
        assert json.loads(file.readline())["reward/mean"] == 16
