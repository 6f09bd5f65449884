"""Images in the folders and under the names that published scorers expect, and the commands that run them."""

import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from sharpening.errors import UserError

KINDS = ("t2i-compbench", "geneval")


def read_geneval_metadata(path: Path) -> list[dict]:
    """The rows of GenEval's `evaluation_metadata.jsonl`, each with its `prompt`.

    Raises:
        UserError: naming `--prompts`.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        if rows and all(isinstance(row["prompt"], str) and "tag" in row for row in rows):
            return rows
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"--export geneval needs --prompts evaluation_metadata.jsonl of GenEval, and {path} is none")


def check_export(kind: str | None, prompts: Sequence[str], num_images: int) -> None:
    """Refuse prompts that a scorer would misread, and a number of images that leaves some prompts with fewer.

    Raises:
        UserError: naming the prompt.
    """
    if kind and num_images % len(prompts):
        usual = {"t2i-compbench": 10, "geneval": 4}[kind]
        raise UserError(
            f"--export {kind}: --num_images {num_images} does not give each of the {len(prompts)} prompts the same "
            f"number; use {usual * len(prompts)} ({usual} each, as published) or another multiple of {len(prompts)}"
        )
    for prompt in prompts if kind == "t2i-compbench" else []:
        # The scorer takes what stands before the first underscore of a file's name for the prompt.
        if set("_/") & set(prompt) or len(prompt.encode()) > 240:
            raise UserError(
                f"--export t2i-compbench: the prompt {prompt[:60]!r} cannot be a file name (it holds an underscore or "
                "a slash, or is too long); leave it out"
            )


def export(kind: str, images: Sequence[Path], prompts: Sequence[str], folder: Path, metadata: Sequence[dict]) -> str:
    """Copy the images of one model into `folder`, anew, and return the commands that score them.

    T2I-CompBench (Huang et al., arXiv 2307.06350): `samples/<prompt>_<number>.png`. GenEval (Ghosh et al., arXiv
    2310.11513): for line N of its metadata the folder N with that line and `samples/<number>.png`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    images_of: dict[str, list[Path]] = {}
    for image, prompt in zip(images, prompts, strict=True):
        images_of.setdefault(prompt, []).append(image)
    place = shlex.quote(str(folder.resolve()))
    if kind == "t2i-compbench":
        (folder / "samples").mkdir(parents=True)
        # Prompt by prompt, as the scorers count: the merging of three scores expects ten images of each in a row.
        ordered = [(prompt, image) for prompt, files in images_of.items() for image in files]
        for index, (prompt, image) in enumerate(ordered):
            shutil.copy(image, folder / "samples" / f"{prompt}_{index:06d}.png")
        return (
            "# in a checkout of https://github.com/Karine-Huang/T2I-CompBench, for the split that was drawn:\n"
            f"(cd BLIPvqa_eval && python BLIP_vqa.py --out_dir={place})           # color, shape, texture\n"
            f"(cd UniDet_eval && python 2D_spatial_eval.py --outpath={place})     # spatial\n"
            f"python CLIPScore_eval/CLIP_similarity.py --outpath={place}          # non_spatial\n"
            f"(cd UniDet_eval && python numeracy_eval.py --outpath={place})       # numeracy\n"
            f"(cd UniDet_eval && python 3D_spatial_eval.py --outpath={place})     # 3d_spatial\n"
            "# complex, with ten images of each prompt: all three, the last two with --complex=True, and then\n"
            f"(cd 3_in_1_eval && python 3_in_1.py --outpath={place})"
        )
    for number, row in enumerate(metadata):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(row))
        for index, image in enumerate(images_of[" ".join(filter(None, map(str.strip, row["prompt"].splitlines())))]):
            shutil.copy(image, samples / f"{index:04d}.png")
    return (
        "# in a checkout of https://github.com/djghosh13/geneval, set up as its README says:\n"
        f"python evaluation/evaluate_images.py {place} --outfile results.jsonl --model-path DETECTOR_FOLDER\n"
        "python evaluation/summary_scores.py results.jsonl"
    )
