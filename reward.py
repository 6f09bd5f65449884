"""The rewards, as a catalogue (`--reward_model`), and a command that scores images on disk with any of them.

Your own reward is the next entry, and needs no change here. Save, for instance, as `my_reward.py`:

    def redness(images, prompts):
        red, green, blue = images.unbind(dim=1)
        return (red - (green + blue) / 2).mean(dim=(1, 2))

and train with `--reward_model ./my_reward.py:redness`. That is the whole contract:

- `images` arrives as a tensor `(B, 3, H, W)`, float32 in [0, 1], on the device that decoded it; no gradient is kept;
- `prompts` arrives as a list of B strings;
- what is returned is a tensor `(B,)` of finite numbers, higher is better. A reward made of parts may return a pair:
  that tensor, and a dictionary of such tensors, which are logged. One that waits for a server may return a function
  without arguments that waits and returns these: branches walk on meanwhile. Anything else stops
  the run with a `RewardError` that names the reward, the rows and their prompts.
  `sharpening.rewards.calling.RowsFailed` says that some images could not be scored.

A reward that holds a model is a class with a method `get_reward(images, prompts)`. It is constructed once, with
those of `device=`, `dtype=` and `cache_dir=` that its constructor has. The classes of the catalogue follow the same
contract; each also gets the flags that begin with its name (`--clip_model` as `model=`), and the model that a spec
names: `clip:ViT-H-14:0.5` is CLIP with that model and the weight 0.5. `sharpening/rewards/spec.py` has the grammar.

Rewards have scales of their own (each entry states its own): the weights of a sum must allow for them.

Try a reward before a run:

    python reward.py --reward_model clip:0.01,./my_reward.py:redness --images DIR --prompts FILE

Importing this module and `parse_reward_spec` are cheap: torch and the models are imported when a reward is loaded.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sharpening.errors import require
from sharpening.flags import Flag
from sharpening.rewards import (
    aesthetic,
    clip,
    compositional,
    mllm,
    ocr,
    score_images,
    t2i_complex,
    t2i_spatial,
    user_rewards,
)
from sharpening.rewards import spec as reward_spec
from sharpening.rewards.blip_vqa import BLIPVQAReward
from sharpening.rewards.compositional import parse_compositional
from sharpening.rewards.hpsv2 import HPSv2Reward
from sharpening.rewards.image_reward import ImageRewardReward
from sharpening.rewards.jpeg_compressibility import JPEGCompressibilityReward
from sharpening.rewards.pickscore import PickScoreReward
from sharpening.rewards.shapes import ShapesReward
from sharpening.rewards.spec import Component

if TYPE_CHECKING:
    import torch

    from sharpening.rewards.calling import Reward, Scorer

# ------------------------------------------------------------------------------------------------------------------
# The catalogue: what an entry scores, its range, and what it needs. The docstring of its class says it in full.
# ------------------------------------------------------------------------------------------------------------------

CATALOGUE: dict[str, Callable[..., Any]] = {
    # How well the image agrees with its prompt: 100 x the cosine of their CLIP embeddings, in [-100, 100], mostly 15
    # to 35. Needs weights that open_clip can download or read (--clip_model).
    "clip": clip.CLIPScoreReward,
    # How people would rate the image for its prompt: mean 0, standard deviation 1, about -2 to 2. Needs ImageReward.pt
    # and the vocabulary of BERT, both from the hub or local.
    "image_reward": ImageRewardReward,
    # Attributes, spatial and non-spatial relations: a weighted sum of IterComp's models, each in the range of
    # image_reward. Needs its three checkpoints and the vocabulary of BERT, from the hub or local (--compositional_*).
    "compositional": compositional.CompositionalReward,
    # The grade that a vision chat model gives, in [0, 1], with the grades of its aspects. Needs an endpoint of the
    # OpenAI protocol and, for OpenAI's own, a key (--mllm_*, --base_url, OPENAI_API_KEY).
    "mllm": mllm.MLLMReward,
    # Which of two images people would pick: about 15 to 25, a difference of 1 means odds of 2.7 to 1. Needs PickScore
    # from the hub or local.
    "pickscore": PickScoreReward,
    # Which of two images people would pick, by HPS v2.1: a cosine, about 0.2 to 0.35. Needs its checkpoint from the
    # hub or local.
    "hpsv2": HPSv2Reward,
    # How beautiful the image is, whatever its prompt: 1 to 10, mostly 5 to 6.5. Needs LAION's predictor and the CLIP
    # that it was trained on (--aesthetic_clip).
    "aesthetic": aesthetic.AestheticReward,
    # Whether each thing that the prompt names is there as it is named: a probability, in [0, 1]. Needs BLIP-VQA from
    # the hub or local.
    "blip_vqa": BLIPVQAReward,
    # The cosine of CLIP ViT-B/32, in [-1, 1], about 0.3: T2I-CompBench's score of non-spatial relations. Needs weights
    # that open_clip can download or read.
    "clip_non_spatial": clip.CLIPNonSpatialReward,
    # Whether two things lie as the prompt says, "a cat on the left of a dog": T2I-CompBench's score of spatial
    # relations, 0 or [0.5, 1]. Needs a detector from the hub or local (--detector).
    "t2i_spatial": t2i_spatial.T2ISpatialReward,
    # The mean of blip_vqa and, as the prompt asks for, t2i_spatial and clip_non_spatial: T2I-CompBench's score of
    # complex prompts, in [-1/2, 1], mostly 0.2 to 0.6. Needs the models of all three (--detector, --t2i_complex_*).
    "t2i_complex": t2i_complex.T2IComplexReward,
    # How much of the text that the prompt puts in quotes is read in the image, in [0, 1]. Needs the package rapidocr,
    # which brings its weights: pip install -e '.[ocr]'.
    "ocr": ocr.OCRReward,
    # Minus the kilobytes of the image as a JPEG, below 0; near -1 at 32 px, around -100 at 512 px. Needs nothing.
    "jpeg_compressibility": JPEGCompressibilityReward,
    # Whether colour, shape and background are those of a caption of the tiny world, in [0, 1]. Needs such captions.
    "shapes": ShapesReward,
}

ENTRY_FLAGS = (
    *clip.FLAGS, *aesthetic.FLAGS, *compositional.FLAGS, *mllm.FLAGS, *t2i_spatial.FLAGS, *t2i_complex.FLAGS,
)  # fmt: skip
REWARD_FLAGS: tuple[Flag, ...] = (
    Flag(
        "reward_model",
        "a name of reward.py, name:MODEL, a weighted sum such as clip:0.01,image_reward:1, module:Name, or "
        "path/file.py:Name",
        default="clip",
    ),
    Flag(
        "reward_failure",
        "when an image cannot be scored: stop, or leave its branch out of the selection",
        default="raise",
        choices=("raise", "skip"),
    ),
    Flag(
        "reward_dtype",
        "dtype of reward models, which are smaller and faster in half precision and less exact; unset: float32",
        choices=("float32", "bfloat16", "float16"),
    ),
    *ENTRY_FLAGS,
)

# ------------------------------------------------------------------------------------------------------------------
# Specs and flags
# ------------------------------------------------------------------------------------------------------------------


def parse_reward_spec(spec: str) -> list[Component]:
    """The components of a `--reward_model` spec, without loading or importing anything.

    Raises:
        UserError: naming `--reward_model`, what is wrong with it and the remedy.
    """
    return reward_spec.parse(spec, CATALOGUE)


def check_reward_flags(values: Mapping[str, Any]) -> None:
    """Every check of flags by name that needs no torch and that no flag of `REWARD_FLAGS` can make of itself.

    Raises:
        UserError: naming the flag and the remedy.
    """
    for component in parse_reward_spec(values["reward_model"]):
        if component.target == "mllm":
            mllm.parse_template(values["mllm_template"], values["mllm_score"])
        if component.target == "compositional":
            parse_compositional(component.model or values["compositional_models"], values["compositional_weights"])
        if component.target == "ocr":
            ocr.check_installed()


def reward_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flags by name, `REWARD_FLAGS` and `cache_dir` among them, as `load_reward` takes them."""
    named = {flag.name: values[flag.name] for flag in ENTRY_FLAGS}
    general = {"failure": values["reward_failure"], "dtype": values["reward_dtype"], "cache_dir": values["cache_dir"]}
    return named | general


# ------------------------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------------------------


def load_reward(
    spec: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    failure: str = "raise",
    processes: int = 1,
    **flags: Any,
) -> Reward:
    """The reward of a `--reward_model` spec, with its models loaded.

    Args:
        spec: see the module's docstring.
        device: where models of the rewards run.
        dtype: of those models, or its name, such as "bfloat16" (`--reward_dtype`); None is float32. Rewards without a
            model on this machine ignore it, and images and scores are float32 in any case.
        failure: `--reward_failure`: "raise", or "skip" to score images that cannot be scored NaN.
        processes: how many of a run share `--mllm_max_calls`.
        flags: `cache_dir`, `base_url`, `api_key`, `detector`, `detector_threshold`, and the flags that begin with the
            name of an entry, such as `clip_model` and `mllm_timeout`; one that is None or left out has its default.

    Raises:
        UserError: naming the flag, if the spec is wrong or a reward cannot be imported, constructed or loaded.
        TypeError: a flag is of no entry.
    """
    import torch

    from sharpening.progress import underway
    from sharpening.rewards.calling import Reward

    for flag in flags:
        if not any(option in inspect.signature(kind).parameters for kind, option in _takers(flag)):
            raise TypeError(f"load_reward() got {flag}, which no reward takes")
    options = {flag.name: flag.default for flag in ENTRY_FLAGS}
    options |= {flag: value for flag, value in flags.items() if value is not None}
    options |= {"device": device, "dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype}
    components = parse_reward_spec(spec)
    graders = sum(component.target == "mllm" for component in components)
    for sharing, number in (("processes", processes), ("graders", graders)):
        cap = options["mllm_max_calls"]
        if cap is not None and number > 1:
            require(cap >= number, f"--mllm_max_calls is {cap}, but {number} {sharing} share it; raise it")
            options["mllm_max_calls"] = cap // number
    scorers = []
    for component in components:
        with underway(f"loading the reward {component.target}"):
            scorers.append(_load_scorer(component, options))
    return Reward(components, scorers, failure)


def _takers(flag: str) -> list[tuple[Callable[..., Any], str]]:
    """The entries that may take a flag, each with what its constructor calls it."""
    own = [(kind, flag.removeprefix(f"{name}_")) for name, kind in CATALOGUE.items() if flag.startswith(f"{name}_")]
    return own or [(kind, flag) for kind in CATALOGUE.values()]


def _load_scorer(component: Component, flags: Mapping[str, Any]) -> Scorer:
    """The function `(images, prompts) -> Tensor (B,)` behind a component."""
    kind = CATALOGUE.get(component.target)
    if kind is None:
        options = {name: flags.get(name) for name in ("device", "dtype", "cache_dir")}
        return user_rewards.load_scorer(component.target, options)
    options = {option: value for flag, value in flags.items() for taker, option in _takers(flag) if taker is kind}
    if component.model is not None:
        options["model"] = component.model
    return user_rewards.construct(kind, options).get_reward


def cli(argv: Sequence[str]) -> int:
    """The command that scores images on disk; its exit status."""

    def load(values: Mapping[str, Any], device: str | torch.device) -> Reward:
        return load_reward(values["reward_model"], device, **reward_options(values))

    return score_images.cli(argv, REWARD_FLAGS, check_reward_flags, load)


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
