"""The rewards, as a catalogue, and the spec that picks among them (`--reward_model`).

Your own reward is the next entry, and needs no change here. Save, for instance, as `my_reward.py`:

    def redness(images, prompts):
        red, green, blue = images.unbind(dim=1)
        return (red - (green + blue) / 2).mean(dim=(1, 2))

and train with `--reward_model ./my_reward.py:redness`. That is the whole contract:

- `images` arrives as a tensor `(B, 3, H, W)`, float32 in [0, 1], on the device that decoded it; no gradient is kept;
- `prompts` arrives as a list of B strings;
- what is returned is a tensor `(B,)` of finite numbers, higher is better. Anything else stops the run with a
  `RewardError` that names the reward, the rows and their prompts.

A reward that holds a model is a class with a method `get_reward(images, prompts)`. It is constructed once, with
those of `device=`, `dtype=` and `cache_dir=` that its constructor has. The classes below follow the same contract.

A spec is one entry or several with weights, separated by commas (so a path holds neither comma nor colon):

    clip                                        an entry of CATALOGUE
    clip:0.01,jpeg_compressibility:1.0          weighted sum; a weight left out is 1, a negative one is a penalty
    ./my_reward.py:redness                      a function, class or object of a file
    my_package.rewards:Redness:0.5              the same of an importable module, with a weight

Rewards have scales of their own (each entry states its own): the weights must allow for them.

Importing this module and `parse_reward_spec` are cheap: torch and the models are imported when a reward is loaded, so
that a mistyped spec is refused in a moment.
"""

from __future__ import annotations

import difflib
import importlib.machinery
import importlib.util
import inspect
import io
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from sharpening.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    Images = Image.Image | Sequence[Image.Image] | Tensor


# ------------------------------------------------------------------------------------------------------------------
# The catalogue
# ------------------------------------------------------------------------------------------------------------------


class JPEGCompressibilityReward:
    """Minus the size in kilobytes (1000 bytes) of the image as a JPEG of quality 95; the prompt plays no part.

    Range: below 0; around -100 for a photograph of 512 px, near -1 for one of 32 px. Needs no weights, so it suits a
    first trial of a training run. Source: the compressibility task of DDPO (Black et al. 2023, arXiv 2305.13301).
    """

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        import torch
        from PIL import Image

        pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        kilobytes = []
        for image in pixels:
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="JPEG", quality=95)
            kilobytes.append(file.tell() / 1000)
        return -torch.tensor(kilobytes, dtype=torch.float32)


class ShapesReward:
    """The captioned-shapes world's own judge: the mean of right colour, right shape and right background.

    Range: [0, 1]. Prompts must be captions of that world, such as "a red circle on a white background"; any other is
    an error. Needs no weights. Source: `sharpening/shapes.py`.
    """

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        import torch

        from sharpening import shapes

        return torch.from_numpy(shapes.score(images.permute(0, 2, 3, 1).cpu().numpy(), prompts))


class CLIPScoreReward:
    """100 x the cosine of the CLIP embeddings of image and prompt (Radford et al. 2021, arXiv 2103.00020).

    Range: [-100, 100]; 15 to 35 for most pairs of photograph and caption with the default model. Prompts are cut at
    the model's context, 77 tokens. Images go through the resize, crop and normalization that the weights were
    published with, done on tensors: at 224 px a score equals open_clip's own; at other sizes it differs by the
    rounding and clipping to 8 bits that PIL's resize adds (0.02 on white noise at 512 px, random ViT-B-32).

    Args:
        clip_model: which model and weights (`--clip_model`), one of

            - `ViT-L-14/openai` (the default): open_clip's name of the architecture, a slash, and the name of weights
              that open_clip can download; `ViT-L-14` alone means its `openai` weights;
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
        clip_model: str = "ViT-L-14/openai",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dir: str | None = None,
    ) -> None:
        import open_clip
        import torch

        self.device = torch.device(device)
        self.dtype = torch.float32 if dtype is None or self.device.type == "cpu" else dtype
        precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]
        architecture, weights = _parse_clip_model(clip_model)
        # OpenAI's weights (and others) were trained with x * sigmoid(1.702 x) in place of GELU. open_clip only warns
        # when the architecture is built with the other one, so the table of published weights decides here.
        quick_gelu = bool(weights) and open_clip.get_pretrained_cfg(architecture, weights).get("quick_gelu", False)
        try:
            self.model = open_clip.create_model(
                architecture,
                pretrained=weights,
                precision=precision,
                device=self.device,
                force_quick_gelu=quick_gelu,
                cache_dir=cache_dir,
                require_pretrained=True,
            )
            self.tokenize = open_clip.get_tokenizer(architecture, cache_dir=cache_dir)
        except Exception as error:
            if weights and Path(weights).is_file():
                remedy = f"the file must be an open_clip state dict of {architecture}, not a TorchScript archive"
            else:
                remedy = (
                    "check the connection, or download the weights elsewhere and give their path: --clip_model "
                    "ViT-L-14-quickgelu/path/to/checkpoint.pt for OpenAI's, NAME/path/to/checkpoint.pt for others"
                )
            raise UserError(
                f"--reward_model clip could not load --clip_model {clip_model} ({_first_line(error)}); {remedy}"
            ) from error
        self.model.eval().requires_grad_(False)
        self.preprocessing = self.model.visual.preprocess_cfg
        if self.preprocessing["resize_mode"] not in ("shortest", "squash"):
            raise UserError(f"--clip_model {clip_model} pads its images, which is not supported; choose another model")

    def get_reward(self, images: Tensor, prompts: list[str]) -> Tensor:
        import torch
        from torch.nn.functional import normalize

        distinct = list(dict.fromkeys(prompts))  # the branches of one sample share their prompt: embed it once
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        pixels = self.preprocess(images.to(self.device)).to(self.dtype)
        tokens = self.tokenize(distinct).to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            image_features = normalize(self.model.encode_image(pixels).float(), dim=-1)  # (B, D)
            text_features = normalize(self.model.encode_text(tokens).float(), dim=-1)  # (distinct, D)
        return 100 * (image_features * text_features[[row_of[prompt] for prompt in prompts]]).sum(dim=-1)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] at the model's size, normalized by its mean and standard deviation."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import center_crop, normalize, resize

        size = self.preprocessing["size"]
        height, width = (size, size) if isinstance(size, int) else size
        squash = self.preprocessing["resize_mode"] == "squash"
        images = resize(
            images,
            [height, width] if squash else [min(height, width)],  # one number: of the shorter side
            interpolation=InterpolationMode(self.preprocessing["interpolation"]),
            antialias=True,
        )
        # Bicubic overshoots at edges. The published path resizes 8-bit images, which cannot leave the range.
        images = center_crop(images, [height, width]).clamp(0, 1)
        return normalize(images, list(self.preprocessing["mean"]), list(self.preprocessing["std"]))


CATALOGUE: dict[str, Callable[..., object]] = {
    "clip": CLIPScoreReward,
    "jpeg_compressibility": JPEGCompressibilityReward,
    "shapes": ShapesReward,
}
UPCOMING = ("image_reward", "compositional", "mllm")


def _parse_clip_model(clip_model: str) -> tuple[str, str | None]:
    """open_clip's `(model name, pretrained)` for a `--clip_model`; the docstring of CLIPScoreReward has the forms."""
    import open_clip

    if clip_model.startswith(("hf-hub:", "local-dir:")):
        return clip_model, None
    architecture, _, weights = clip_model.partition("/")
    known = open_clip.list_models()
    if architecture not in known:
        raise UserError(
            f"--clip_model {clip_model} does not begin with a model that open_clip knows"
            f"{_suggest(architecture, known)}; write NAME/WEIGHTS, such as ViT-L-14/openai or "
            "ViT-L-14-quickgelu/path/to/checkpoint.pt"
        )
    weights = weights or "openai"
    if open_clip.is_pretrained_cfg(architecture, weights):
        return architecture, weights
    path = Path(weights).expanduser()
    if not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise UserError(
            f"--clip_model {clip_model}: {weights} is neither an existing file nor the name of weights for "
            f"{architecture}; open_clip has {', '.join(tags) or 'none for this model'}"
        )
    return architecture, str(path)


# ------------------------------------------------------------------------------------------------------------------
# The spec
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Component:
    """One term of a reward: the `name` its curve carries, its `weight`, and what to load, the `target`.

    `target` is a key of CATALOGUE, or `module:Name` or `file.py:Name`; then `name` is that Name.
    """

    name: str
    weight: float
    target: str


def parse_reward_spec(spec: str) -> list[Component]:
    """The components of a `--reward_model` spec, in its order; grammar in the module's docstring.

    Checks all that can be checked without importing or loading anything: names, weights, that files exist and that
    modules can be found.

    Raises:
        UserError: naming `--reward_model`, what is wrong with it and the remedy.
    """
    if not spec.strip():
        raise UserError(f"--reward_model is empty; give {_choices()}")
    entries = [entry.strip() for entry in spec.split(",")]
    if not all(entries):
        raise UserError(f"--reward_model {spec} has a comma with nothing on one side; remove it")
    components = [_parse_entry(entry) for entry in entries]
    names = [component.name for component in components]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--reward_model {spec} names {name} {names.count(name)} times; name it once with the total weight, "
                "or rename one of two rewards of your own that share a name"
            )
    return components


def _parse_entry(entry: str) -> Component:
    head, *rest = (part.strip() for part in entry.split(":"))
    if head in UPCOMING:
        raise UserError(f"--reward_model {head} is not available yet in this version; give {_choices()}")
    if head in CATALOGUE:
        return Component(head, _parse_weight(entry, rest), head)
    is_file = _is_file(head)
    is_module = not is_file and all(part.isidentifier() for part in head.split("."))
    if not (is_file or (is_module and (rest or "." in head))):
        raise UserError(f"--reward_model {entry} is unknown{_suggest(head, CATALOGUE)}; give {_choices()}")
    if not rest or not rest[0].isidentifier():
        raise UserError(f"--reward_model {entry} does not say which function or class to take; write {head}:NAME")
    weight = _parse_weight(entry, rest[1:])
    if is_module and not _is_importable(head.partition(".")[0]):
        raise UserError(
            f"--reward_model {entry}: Python finds no module {head}{_suggest(head, CATALOGUE)}; give the path of its "
            "file (path/to/file.py:Name), or put its folder on PYTHONPATH"
        )
    if is_file and not Path(head).expanduser().is_file():
        raise UserError(f"--reward_model {entry}: there is no file {head}; correct the path")
    return Component(rest[0], weight, f"{head}:{rest[0]}")


def _parse_weight(entry: str, rest: list[str]) -> float:
    """The weight that the parts of an entry after its name give, 1 if there are none."""
    if not rest:
        return 1.0
    try:
        (text,) = rest
        weight = float(text)
    except ValueError:
        raise UserError(
            f"--reward_model {entry}: {':'.join(rest) or 'nothing'} is not a number; what follows the name is its "
            "weight, such as 0.5"
        ) from None
    if not math.isfinite(weight) or weight == 0:
        raise UserError(
            f"--reward_model {entry} has the weight {text}; give a finite number other than 0, or drop the reward"
        )
    return weight


def _is_file(location: str) -> bool:
    """Whether the part of an entry before its name is the path of a file rather than a module."""
    return location.endswith(".py") or "/" in location


def _is_importable(package: str) -> bool:
    """Whether Python finds a package; for outermost ones only, as finding a submodule imports what is around it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # loaded, but without a spec, as `__main__` is
        return True


def _choices() -> str:
    return f"{', '.join(CATALOGUE)}, or your own as path/to/file.py:Name or module:Name"


def _suggest(word: str, known: Iterable[str]) -> str:
    """A question that offers the nearest known word, or nothing."""
    by_lower = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[nearest[0]]}?)" if nearest else ""


def _first_line(error: BaseException) -> str:
    """An exception on one line: state-dict mismatches, for one, run to hundreds."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300].rstrip(':;,. ')}"


# ------------------------------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------------------------------


class RewardError(RuntimeError):
    """A reward failed or returned something that is no reward. The message is one sentence that names all of it.

    Attributes:
        reward: name of the component.
        rows: rows of the batch concerned; all of them if the reward as a whole failed.
        prompts: the prompts of those rows.
    """

    def __init__(self, reward: str, problem: str, rows: list[int], prompts: list[str]) -> None:
        self.reward, self.rows, self.prompts = reward, rows, prompts
        shown = [f"row {row}: {prompt!r}" for row, prompt in zip(rows[:8], prompts[:8], strict=True)]
        if len(rows) > 8:
            shown.append(f"and {len(rows) - 8} more")
        super().__init__(f"the reward {reward} {problem} ({'; '.join(shown)})")


class Reward:
    """A weighted sum of rewards, as `load_reward` makes it; each component is called once per batch.

    Each method takes images as one PIL image, a list of PIL images, or a float tensor `(B, 3, H, W)` in [0, 1], on any
    device; and prompts as a list of B strings, or one string for one image. Tensors stay tensors and PIL images become
    tensors, so that both score alike; a list of images of several sizes is scored in one batch per size.

    Results are float32 on the CPU, `(B,)`, finite, higher is better; no gradient flows.

    Raises (each method):
        RewardError: if a component raises, or returns anything but B finite numbers.
        ValueError: if images or prompts are not of the forms above.
    """

    def __init__(self, components: list[Component], scorers: list[Callable[[Tensor, list[str]], Tensor]]) -> None:
        self.components = components
        self._scorers = scorers

    def get_reward(self, images: Images, prompts: str | list[str]) -> Tensor:
        """The weighted sum of the components, `(B,)`."""
        return self.score(images, prompts)[0]

    def get_components(self, images: Images, prompts: str | list[str]) -> dict[str, Tensor]:
        """The components by name, `(B,)` each, without their weights."""
        return self.score(images, prompts)[1]

    def score(self, images: Images, prompts: str | list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum and the raw components from one call of each, for training that also logs the parts."""
        import torch

        if isinstance(prompts, str):
            prompts = [prompts]
        batches = _batches(images, prompts)
        values = {component.name: torch.empty(len(prompts), dtype=torch.float32) for component in self.components}
        with torch.no_grad():
            for rows, batch in batches:
                batch_prompts = [prompts[row] for row in rows]
                for component, scorer in zip(self.components, self._scorers, strict=True):
                    values[component.name][rows] = _checked_call(component.name, scorer, batch, batch_prompts, rows)
        total = sum(component.weight * values[component.name] for component in self.components)
        if not total.isfinite().all():  # only weights beyond float32 lead here
            rows = (~total.isfinite()).nonzero().flatten().tolist()
            names = "+".join(values)
            raise RewardError(names, "has a weighted sum beyond float32", rows, [prompts[row] for row in rows])
        return total, values


def load_reward(
    spec: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    clip_model: str | None = None,
    cache_dir: str | None = None,
) -> Reward:
    """The reward of a `--reward_model` spec, with its models loaded.

    Args:
        spec: see the module's docstring.
        device: where models of the rewards run.
        dtype: of those models on a GPU; None is float32. On the CPU it is always float32.
        clip_model: `--clip_model`, see `CLIPScoreReward`; None is its default.
        cache_dir: where downloads are kept; None is the default of each library.

    Raises:
        UserError: naming the flag, if the spec is wrong or a reward cannot be imported, constructed or loaded.
    """
    options = {"device": device, "dtype": dtype, "clip_model": clip_model, "cache_dir": cache_dir}
    components = parse_reward_spec(spec)
    return Reward(components, [_load_scorer(component.target, options) for component in components])


def _load_scorer(target: str, options: dict[str, object]) -> Callable[[Tensor, list[str]], Tensor]:
    """The function `(images, prompts) -> Tensor (B,)` behind a component's target."""
    if target in CATALOGUE:
        return _construct(CATALOGUE[target], options).get_reward
    location, _, name = target.partition(":")
    try:
        module = _import_file(location) if _is_file(location) else importlib.import_module(location)
    except Exception as error:
        raise UserError(
            f"--reward_model {target}: importing {location} failed with {_first_line(error)}; mend it, or install "
            "what it needs"
        ) from error
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f"--reward_model {target}: {location} holds no {name}{_suggest(name, known)}; name one of its functions "
            "or classes"
        )
    found = getattr(module, name)
    if inspect.isclass(found):
        try:
            found = _construct(found, options)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"--reward_model {target}: constructing {name} failed with {_first_line(error)}; its constructor is "
                "called with those of device=, dtype= and cache_dir= that it has, and nothing else"
            ) from error
    scorer = getattr(found, "get_reward", found)
    if not callable(scorer):
        raise UserError(
            f"--reward_model {target}: {name} is neither a function nor has it a method get_reward(images, prompts); "
            "add one"
        )
    return scorer


def _construct(kind: Callable[..., object], options: dict[str, object]) -> object:
    """An instance, given those of the options that its constructor names and that are set."""
    named = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in options.items() if key in named and value is not None})


def _import_file(location: str) -> ModuleType:
    path = Path(location).expanduser().resolve()
    name = f"reward_file:{path}"  # cannot clash with a module, and tracebacks show where it came from
    if name in sys.modules:
        return sys.modules[name]
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _batches(images: Images, prompts: list[str]) -> list[tuple[list[int], Tensor]]:
    """The images as `(rows, tensor (len(rows), 3, H, W) float32)` per image size; ValueError for malformed input."""
    import numpy as np
    import torch
    from PIL import Image

    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be a float tensor (B, 3, H, W) in [0, 1], not {images.dtype} {tuple(images.shape)}"
            )
        count, batches = len(images), [(list(range(len(images))), images.detach().float())]
    else:
        images = [images] if isinstance(images, Image.Image) else list(images)
        rows_of_size: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(images):
            if not isinstance(image, Image.Image):
                raise ValueError(f"images must be PIL images or one tensor (B, 3, H, W), not a {type(image).__name__}")
            rows_of_size.setdefault(image.size, []).append(row)
        count, batches = len(images), []
        for rows in rows_of_size.values():
            pixels = np.stack([np.asarray(images[row].convert("RGB")) for row in rows])  # (B, H, W, 3) uint8
            batches.append((rows, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255))
    if count == 0 or count != len(prompts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"each image needs its prompt, a string: got {count} images and {len(prompts)} prompts")
    return batches


def _checked_call(
    name: str,
    scorer: Callable[[Tensor, list[str]], Tensor],
    images: Tensor,  # (B, 3, H, W)
    prompts: list[str],
    rows: list[int],  # of `images` within the whole call
) -> Tensor:
    """What the scorer returns, `(B,)` float32 on the CPU, or a RewardError about it."""
    import torch

    try:
        # Copies, so that a reward that edits its input cannot mislead the ones after it.
        result = scorer(images.clone(), list(prompts))
    except Exception as error:
        raise RewardError(name, f"failed with {_first_line(error)}", rows, prompts) from error
    if not isinstance(result, torch.Tensor):
        raise RewardError(name, f"returned a {type(result).__name__} instead of a torch.Tensor", rows, prompts)
    if result.shape != (len(prompts),) or result.is_complex():
        problem = f"returned {result.dtype} {tuple(result.shape)} instead of real numbers of shape ({len(prompts)},)"
        raise RewardError(name, problem, rows, prompts)
    result = result.detach().to("cpu", torch.float32)
    bad = (~result.isfinite()).nonzero().flatten().tolist()
    if bad:
        values = ", ".join(str(result[row].item()) for row in bad[:8])
        problem = f"returned {values} for {len(bad)} of {len(prompts)} images"
        raise RewardError(name, problem, [rows[row] for row in bad], [prompts[row] for row in bad])
    return result
