"""Grading schemes of the MLLM reward (`--mllm_template`): one text file each, in this folder or anywhere.

A file opens with lines `key: value` and a line of three dashes; below it stands what the grader is told:

    aspects: accuracy_to_prompt, visual_quality
    scale: 0 10
    ---
    You grade images ...

`aspects` are the keys of the reply's JSON object, each an object with a `justification` and a `score` on the scale;
the reply also has an `overall` score. The text need not describe that object: the format is added below it. The prompt
of an image is never pasted into the text; the grader gets it apart, marked as data, so the text has no placeholders.

With nothing behind `aspects:` the reply is text that ends in one number on the scale, `Final Score: 4`: what reward
models made of vision chat models write (UnifiedReward, Wang et al. 2025, arXiv 2503.05236), and any such model can.
"""

from dataclasses import dataclass
from pathlib import Path

from sharpening.errors import UserError, did_you_mean

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Template:
    """A grading scheme.

    Attributes:
        instructions: what the grader is told, the same for every image.
        aspects: keys of the scores in a reply, besides `overall`; none if it holds one number alone.
        low, high: the scale of every score.
    """

    instructions: str
    aspects: tuple[str, ...]
    low: float
    high: float


def load_template(name: str) -> Template:
    """The template of a `--mllm_template`: a name in this folder (`five_aspects`), or the path of a file.

    Raises:
        UserError: naming the flag and the file, if there is none or it is malformed.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.txt"))
    path = FOLDER / f"{name}.txt" if name in known else Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"--mllm_template {name} is neither a file nor one of {', '.join(known)}{did_you_mean(name, known)}"
        )
    header, separator, instructions = path.read_text(encoding="utf-8").partition("\n---\n")
    values = {}
    for line in header.splitlines():
        key, _, value = line.partition(":")
        values[key.strip()] = value.strip()
    try:
        low, high = map(float, values["scale"].split())
        aspects = tuple(aspect.strip() for aspect in values["aspects"].split(",")) if values["aspects"] else ()
        well_formed = bool(separator and instructions.strip()) and low < high
    except (KeyError, ValueError):
        well_formed = False
    if not well_formed or not all(aspect.isidentifier() and aspect != "overall" for aspect in aspects):
        raise UserError(
            f"--mllm_template {name}: {path} must begin with `aspects: one_word, another` and `scale: 0 10`, a line "
            "of three dashes, and then what the grader is told; mllm_template/five_aspects.txt is an example"
        )
    return Template(instructions.strip(), aspects, low, high)
