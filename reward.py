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
those of `device=`, `dtype=` and `cache_dir=` that its constructor has. The classes below follow the same contract;
each also gets the flags that begin with its name (`--clip_model` as `model=`), and the model that a spec names:
`clip:ViT-H-14:0.5` is CLIP with that model and the weight 0.5. `sharpening/rewards/spec.py` has the grammar.

Rewards have scales of their own (each entry states its own): the weights of a sum must allow for them.

Try a reward before a run:

    python reward.py --reward_model clip:0.01,./my_reward.py:redness --images DIR --prompts FILE

Importing this module and `parse_reward_spec` are cheap: torch and the models are imported when a reward is loaded.
"""

from __future__ import annotations

import inspect
import io
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sharpening.errors import UserError, first_line
from sharpening.rewards import spec as reward_spec
from sharpening.rewards import user_rewards
from sharpening.rewards.spec import Component

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from sharpening.rewards.calling import Reward, Scorer
    from sharpening.rewards.grader import Failure, Grades


# ------------------------------------------------------------------------------------------------------------------
# The catalogue
# ------------------------------------------------------------------------------------------------------------------


class CLIPScoreReward:
    """100 x the cosine of the CLIP embeddings of image and prompt (Radford et al. 2021, arXiv 2103.00020).

    Range: [-100, 100]; 15 to 35 for most pairs of photograph and caption with the default model. Prompts are cut at
    the model's context, 77 tokens. Images go through the resize, crop and normalization that the weights were
    published with, done on tensors: at 224 px a score equals open_clip's own; at other sizes it differs by the
    rounding and clipping to 8 bits that PIL's resize adds (0.02 on white noise at 512 px, random ViT-B-32).

    Args:
        model: which model and weights (`--clip_model`, or `clip:MODEL` in the spec), one of

            - `ViT-L-14/openai` (the default): open_clip's name of the architecture, a slash, and the name of weights
              that open_clip can download; `ViT-H-14` alone means OpenAI's weights, or the first that it lists;
            - `ViT-L-14/path/to/checkpoint.pt`: the weights are a local file (.pt, .bin or .safetensors of an
              open_clip state dict; an absolute path gives two slashes). A file does not say which activation
              it was trained with: for OpenAI's weights and all that descend from them write
              `ViT-L-14-quickgelu/path/...`, or every score is quietly wrong. Named weights need no such care;
            - `hf-hub:organization/name` or `local-dir:path/to/folder`: a repository or folder that open_clip
              can read (`open_clip_config.json` beside the weights).
        device: where the model runs.
        dtype: of the weights and activations on a GPU; on the CPU it is always float32. In float32 an image scores
            the same alone and in any batch to 1e-4; half precision keeps about three digits.
        cache_dir: where downloads are kept (`--cache_dir`); None is open_clip's own choice.

    Raises:
        UserError: naming the flag, if the model or its weights cannot be had.
    """

    def __init__(
        self,
        model: str = "ViT-L-14/openai",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.clip import OpenCLIP

        self.clip = OpenCLIP(f"--clip_model {model}", model, device, dtype, cache_dir)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 100 * (self.clip.embed_images(images) * self.clip.embed_prompts(prompts)).sum(dim=-1)


class ImageRewardReward:
    """ImageReward (Xu et al. 2023, arXiv 2304.05977): how people would rate the image for this prompt.

    Range: unbounded, normalized to mean 0 and standard deviation 1 over its authors' images; about -2 to 2. Prompts
    are cut at 35 tokens. Images stay tensors. Against the authors' path through PIL a score moves by the rounding
    of PIL's resize: `tests/test_image_reward.py` bounds it.

    Args:
        model: the published `ImageReward.pt`: path, folder, or hub id `owner/repository[/file]`
            (`image_reward:MODEL` in the spec). Every key of it must fit. The vocabulary of bert-base-uncased is read
            from a `vocab.txt` beside a local checkpoint if there is one, else from the hub.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if the checkpoint or the vocabulary cannot be had or does not fit.
    """

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.image_reward import ImageRewardScorer

        self.scorer = ImageRewardScorer(f"--reward_model image_reward:{model}", model, device, dtype, cache_dir)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.scorer.score(images, prompts)


class CompositionalReward:
    """A weighted sum of IterComp's reward models (Zhang et al. 2024, arXiv 2410.07171), each one logged on its own.

    Range: that of ImageReward, whose architecture they share, times the weights. Their authors published the training
    of these models and not the weights, so there is no default: train them with IterComp's scripts.

    Args:
        models: `attribute=PATH,spatial=PATH,non_spatial=PATH` (`--compositional_models`): any names, each with a path
            or hub id as ImageRewardReward takes it; or one path alone.
        weights: as many numbers, `1,0.5,1` (`--compositional_weights`); None is 1 each.
        model: one path alone, `compositional:PATH` in the spec; wins over `models`.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if no model is named or one cannot be had or does not fit.
    """

    def __init__(
        self,
        model: str | None = None,
        models: str | None = None,
        weights: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        self.weights, paths = parse_compositional(model or models, weights)
        from sharpening.rewards.image_reward import ImageRewardScorer

        self.scorers = {
            name: ImageRewardScorer(f"--compositional_models {name or path}", path, device, dtype, cache_dir)
            for name, path in paths.items()
        }

    def get_reward(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        parts = {name: scorer.score(images, prompts) for name, scorer in self.scorers.items()}
        total = sum(weight * part for weight, part in zip(self.weights, parts.values(), strict=True))
        return total, parts if len(parts) > 1 else {}


class MLLMReward:
    """The grade that a vision chat model gives the image for its prompt (the paper's MLLM grader, section 4.1).

    Range: [0, 1]: the overall score, or the mean of the aspects, mapped from the template's scale. The aspects are
    logged on their own, on that same range. An image that could not be graded has no score: `--reward_failure` decides
    whether that stops the run or only leaves its branch out of the selection.

    Args:
        model: name at the endpoint (`--mllm_model`, or `mllm:MODEL` in the spec).
        template: `--mllm_template`, a scheme of `mllm_template/` or a file.
        score: `--mllm_score`, "overall" or "mean" (of the aspects).
        base_url, api_key, concurrency, timeout, max_retries, max_calls: see `sharpening.rewards.grader.Grader`.
        cache_dir: grades are kept in its `diffusion_sharpening/mllm_grades`; None is the hub library's cache.

    Raises:
        UserError: naming the flag, if the template is malformed, or the endpoint refuses the key or is out of reach.
    """

    def __init__(
        self,
        model: str = "gpt-4o",
        template: str = "five_aspects",
        score: str = "overall",
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 3,
        max_calls: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from mllm_template import load_template

        self.template, self.score = load_template(template), score
        from huggingface_hub.constants import HF_HOME

        from sharpening.rewards.grader import Grader

        folder = Path(cache_dir or HF_HOME).expanduser() / "diffusion_sharpening" / "mllm_grades"
        self.grader = Grader(
            self.template, model, base_url, api_key, concurrency, timeout, max_retries, max_calls, folder
        )

    def get_reward(self, images: Tensor, prompts: list[str]) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
        """Begin to grade; what is returned waits for the scores and the aspects."""
        wait = self.grader.begin(_to_uint8(images), prompts)
        return lambda: self._scores(wait())

    def _scores(self, outcomes: Sequence[Grades | Failure]) -> tuple[Tensor, dict[str, Tensor]]:
        import torch

        from sharpening.rewards.calling import RowsFailed
        from sharpening.rewards.grader import Failure

        reasons = {row: outcome.reason for row, outcome in enumerate(outcomes) if isinstance(outcome, Failure)}
        low, high = self.template.low, self.template.high
        parts = {name: torch.full((len(outcomes),), torch.nan) for name in (*self.template.aspects, "overall")}
        for row, outcome in enumerate(outcomes):
            if row not in reasons:
                for name, value in {**outcome.aspects, "overall": outcome.overall}.items():
                    parts[name][row] = (value - low) / (high - low)
        overall = parts.pop("overall")
        total = overall if self.score == "overall" else torch.stack(list(parts.values())).mean(dim=0)
        if reasons:
            raise RowsFailed((total, parts), reasons)
        return total, parts


class PickScoreReward:
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): a CLIP ViT-H trained on which of two images people picked.

    Range: exp(logit scale) x cosine, about 15 to 25. A difference of 1 between two images of one prompt means that
    people choose the better one with probability sigmoid(1) = 0.73. Prompts are cut at 77 tokens.

    Args:
        model: hub id or folder of a transformers CLIPModel (`pickscore:MODEL` in the spec). Tokenizer and image
            processor are read beside it, or, as its authors do, from laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if a part cannot be had.
    """

    PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        import torch
        from transformers import CLIPModel, CLIPProcessor

        from sharpening.rewards.preprocessing import device_dtype

        self.device, self.dtype = torch.device(device), device_dtype(device, dtype)
        folder = Path(model).expanduser()
        local = any((folder / f"{name}_config.json").is_file() for name in ("processor", "preprocessor"))
        try:
            self.clip = CLIPModel.from_pretrained(model, dtype=self.dtype, cache_dir=cache_dir)
            processor = CLIPProcessor.from_pretrained(model if local else self.PROCESSOR, cache_dir=cache_dir)
            if processor.tokenizer.vocab_size < 10:  # what transformers makes, without a word, when it finds no files
                raise OSError("its tokenizer has no vocabulary")
        except Exception as error:
            raise UserError(
                f"--reward_model pickscore:{model} could not be loaded ({first_line(error)}); check the name and the "
                "connection, or give a folder that holds the model, its tokenizer and its preprocessor_config.json"
            ) from error
        self.clip.to(self.device).eval().requires_grad_(False)
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        import torch
        from torch.nn.functional import normalize

        from sharpening.rewards.preprocessing import in_slices, preprocess

        config = self.image_processor
        pixels = preprocess(images.to(self.device), config.crop_size["height"], config.image_mean, config.image_std)
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        with torch.autocast(self.device.type, enabled=False):
            image_features = in_slices(self._embed, pixels.to(self.dtype)).float()
            text_features = self.clip.get_text_features(**tokens.to(self.device)).pooler_output.float()
        cosine = (normalize(image_features, dim=-1) * normalize(text_features, dim=-1)).sum(dim=-1)
        return self.clip.logit_scale.float().exp() * cosine

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.clip.get_image_features(pixels).pooler_output


class HPSv2Reward:
    """HPS v2.1 (Wu et al. 2023, arXiv 2306.09341): a CLIP ViT-H-14 trained on human preferences.

    Range: a cosine, [-1, 1]; about 0.2 to 0.35. Images that are not square are padded with black, as published.

    Args:
        model: the published `HPS_v2.1_compressed.pt`: path, folder, or hub id (`hpsv2:MODEL` in the spec). A state
            dict of another architecture of open_clip is written `ARCHITECTURE=PATH`.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if the checkpoint cannot be had or does not fit.
    """

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.checkpoint_files import find_checkpoint
        from sharpening.rewards.clip import OpenCLIP

        flag = f"--reward_model hpsv2:{model}"
        architecture, name = _named(model)
        path = find_checkpoint(flag, name, "HPS_v2.1_compressed.pt", cache_dir)
        self.clip = OpenCLIP(flag, f"{architecture or 'ViT-H-14'}/{path}", device, dtype, cache_dir)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (self.clip.embed_images(images, "longest") * self.clip.embed_prompts(prompts)).sum(dim=-1)


class AestheticReward:
    """LAION's aesthetic predictor v2 (Schuhmann 2022): linear layers on the CLIP embedding of the image alone.

    Range: a rating from 1 to 10; about 5 to 6.5 for what text-to-image models draw. The prompt plays no part.

    Args:
        model: the published `sac+logos+ava1-l14-linearMSE.pth`: path, folder, or hub id (`aesthetic:MODEL` in the
        spec). clip: the CLIP it was trained on (`--aesthetic_clip`), named as `--clip_model` names it.
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if the checkpoint or CLIP cannot be had or do not fit.
    """

    def __init__(
        self,
        model: str = "camenduru/improved-aesthetic-predictor",
        clip: str = "ViT-L-14/openai",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.checkpoint_files import find_checkpoint, read_state_dict
        from sharpening.rewards.clip import OpenCLIP
        from sharpening.rewards.image_reward import linear_head

        flag = f"--reward_model aesthetic:{model}"
        path = find_checkpoint(flag, model, "sac+logos+ava1-l14-linearMSE.pth", cache_dir)
        weights = {name.removeprefix("layers."): tensor for name, tensor in read_state_dict(flag, path).items()}
        self.clip = OpenCLIP(f"--aesthetic_clip {clip}", clip, device, dtype, cache_dir)
        try:
            self.head = linear_head(weights).requires_grad_(False)
            self.head.load_state_dict(weights)
        except Exception as error:
            raise UserError(f"{flag}: {path} is not that predictor ({first_line(error)}); give its file") from error
        self.head.to(self.clip.device)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.clip.embed_images(images)).squeeze(1)


class BLIPVQAReward:
    """BLIP-VQA, T2I-CompBench's score of attribute binding (Huang et al. 2023, arXiv 2307.06350).

    For every noun phrase of the prompt, "a red apple", the probability that BLIP (Li et al. 2022, arXiv 2201.12086)
    answers yes rather than no to "a red apple?"; the score is their product. Range: [0, 1]. The benchmark reports the
    mean over the images of its colour, shape and texture prompts. `sharpening/rewards/blip_vqa.py` says what differs
    from its code: above all, the phrases are found by rules that know its forms of prompts, not by a parser.

    Args:
        model: hub id or folder of a transformers BlipForQuestionAnswering with its processor (`blip_vqa:MODEL` in the
            spec).
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if a part cannot be had or does not fit.
    """

    def __init__(
        self,
        model: str = "Salesforce/blip-vqa-base",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.blip_vqa import BLIPVQAScorer

        self.scorer = BLIPVQAScorer(f"--reward_model blip_vqa:{model}", model, device, dtype, cache_dir)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.scorer.score(images, prompts)


class CLIPNonSpatialReward:
    """T2I-CompBench's score of non-spatial relations (Huang et al. 2023, arXiv 2307.06350): CLIPScore of ViT-B/32.

    Range: a cosine, [-1, 1], as the benchmark's tables print it; about 0.3 for prompts of that set. It is
    `clip:ViT-B-32` without the factor 100. The benchmark runs CLIP in half precision on a GPU and refuses a prompt of
    more than 77 tokens; here it is float32, and the prompt is cut.

    Args:
        model: as for CLIPScoreReward (`clip_non_spatial:MODEL` in the spec).
        device, dtype, cache_dir: as for CLIPScoreReward.

    Raises:
        UserError: naming the flag, if the model or its weights cannot be had.
    """

    def __init__(
        self,
        model: str = "ViT-B-32/openai",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        from sharpening.rewards.clip import OpenCLIP

        self.clip = OpenCLIP(f"--reward_model clip_non_spatial:{model}", model, device, dtype, cache_dir)

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (self.clip.embed_images(images) * self.clip.embed_prompts(prompts)).sum(dim=-1)


class JPEGCompressibilityReward:
    """Minus the size in kilobytes (1000 bytes) of the image as a JPEG of quality 95; the prompt plays no part.

    Range: below 0; around -100 for a photograph of 512 px, near -1 for one of 32 px. Needs no weights, so it suits a
    first trial of a training run. Source: the compressibility task of DDPO (Black et al. 2023, arXiv 2305.13301).
    """

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        import torch
        from PIL import Image

        kilobytes = []
        for image in _to_uint8(images):
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="JPEG", quality=95)
            kilobytes.append(file.tell() / 1000)
        return -torch.tensor(kilobytes, dtype=torch.float32)


class ShapesReward:
    """The captioned-shapes world's own judge: the mean of right colour, right shape and right background.

    Range: [0, 1]. Prompts must be captions of that world, such as "a red circle on a white background"; any other is
    an error. Needs no weights. Source: `tiny_world/shapes.py`.
    """

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        import torch

        from tiny_world import shapes

        return torch.from_numpy(shapes.score(images.permute(0, 2, 3, 1).cpu().numpy(), prompts))


CATALOGUE: dict[str, Callable[..., object]] = {
    "clip": CLIPScoreReward,
    "image_reward": ImageRewardReward,
    "compositional": CompositionalReward,
    "mllm": MLLMReward,
    "pickscore": PickScoreReward,
    "hpsv2": HPSv2Reward,
    "aesthetic": AestheticReward,
    "blip_vqa": BLIPVQAReward,
    "clip_non_spatial": CLIPNonSpatialReward,
    "jpeg_compressibility": JPEGCompressibilityReward,
    "shapes": ShapesReward,
}


def _to_uint8(images: Tensor) -> np.ndarray:
    """Images `(B, 3, H, W)` in [0, 1] as `(B, H, W, 3)` uint8."""
    import torch

    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def _named(entry: str) -> tuple[str, str]:
    """`NAME=PATH` as both, or a path alone, with an empty name: a path may hold = itself, a name no slash."""
    name, separator, path = entry.partition("=")
    return (name, path) if separator and "/" not in name else ("", entry)


def parse_compositional(models: str | None, weights: str | None) -> tuple[list[float], dict[str, str]]:
    """The weights and the paths by name (the name of a path alone is empty) of CompositionalReward's flags."""
    if not models:
        raise UserError(
            "--reward_model compositional has no published weights to fall back on; name your checkpoints with "
            "--compositional_models attribute=PATH,spatial=PATH,non_spatial=PATH, or one as compositional:PATH"
        )
    pairs = [_named(entry.strip()) for entry in models.split(",")]
    paths = dict(pairs)
    if not all(paths.values()) or len(paths) != len(pairs) or (len(pairs) > 1 and "" in paths):
        raise UserError(
            f"--compositional_models {models} must be distinct names with paths, such as attribute=a.pt,spatial=b.pt"
        )
    try:
        factors = [float(weight) for weight in weights.split(",")] if weights else [1.0] * len(paths)
    except ValueError:
        factors = []
    if len(factors) != len(paths) or not all(map(math.isfinite, factors)):
        raise UserError(f"--compositional_weights {weights} must be {len(paths)} numbers, one for each of {models}")
    return factors, paths


# ------------------------------------------------------------------------------------------------------------------
# Loading
# ------------------------------------------------------------------------------------------------------------------


def parse_reward_spec(spec: str) -> list[Component]:
    """The components of a `--reward_model` spec, without loading or importing anything.

    Raises:
        UserError: naming `--reward_model`, what is wrong with it and the remedy.
    """
    return reward_spec.parse(spec, CATALOGUE)


def load_reward(
    spec: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    failure: str = "raise",
    **flags: object,
) -> Reward:
    """The reward of a `--reward_model` spec, with its models loaded.

    Args:
        spec: see the module's docstring.
        device: where models of the rewards run.
        dtype: of those models on a GPU; None is float32. On the CPU it is always float32.
        failure: `--reward_failure`: "raise", or "skip" to score images that cannot be scored NaN.
        flags: `cache_dir`, `base_url`, `api_key`, and the flags that begin with the name of an entry, such as
            `clip_model` and `mllm_timeout`; None is the entry's own default.

    Raises:
        UserError: naming the flag, if the spec is wrong or a reward cannot be imported, constructed or loaded.
        TypeError: a flag is of no entry.
    """
    from sharpening.rewards.calling import Reward

    flags |= {"device": device, "dtype": dtype}
    for flag in flags:
        if not any(option in inspect.signature(kind).parameters for kind, option in _takers(flag)):
            raise TypeError(f"load_reward() got {flag}, which no reward takes")
    components = parse_reward_spec(spec)
    graders, cap = sum(component.target == "mllm" for component in components), flags.get("mllm_max_calls")
    if graders > 1 and cap is not None:  # the cap is for all of them
        if cap < graders:
            raise UserError(f"--mllm_max_calls is {cap}, but {graders} graders share it; raise it")
        flags["mllm_max_calls"] = cap // graders
    return Reward(components, [_load_scorer(component, flags) for component in components], failure)


def _takers(flag: str) -> list[tuple[Callable[..., object], str]]:
    """The entries that may take a flag, each with what its constructor calls it."""
    own = [(kind, flag.removeprefix(f"{name}_")) for name, kind in CATALOGUE.items() if flag.startswith(f"{name}_")]
    return own or [(kind, flag) for kind in CATALOGUE.values()]


def _load_scorer(component: Component, flags: dict[str, object]) -> Scorer:
    """The function `(images, prompts) -> Tensor (B,)` behind a component."""
    target = component.target
    if target in CATALOGUE:
        kind = CATALOGUE[target]
        options = {option: value for flag, value in flags.items() for taker, option in _takers(flag) if taker is kind}
        if component.model is not None:
            options["model"] = component.model
        return user_rewards.construct(kind, options).get_reward
    options = {key: flags.get(key) for key in ("device", "dtype", "cache_dir")}
    return user_rewards.load_scorer(target, options)


if __name__ == "__main__":
    from sharpening.rewards.score_images import cli

    sys.exit(cli(sys.argv[1:]))
