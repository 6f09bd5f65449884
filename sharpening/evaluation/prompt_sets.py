"""Prompts to evaluate on: a file of one's own, or a published benchmark by its name."""

from pathlib import Path

from sharpening.data.prompts import load_prompts
from sharpening.errors import UserError, did_you_mean, first_line
from tiny_world import shapes

COMPBENCH = "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/main/examples/dataset/{}.txt"
COMPBENCH_SPLITS = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
# name -> (what `datasets.load_dataset` takes, the column of the prompts)
PUBLISHED: dict[str, tuple[dict[str, str], str]] = {
    "drawbench": ({"path": "sayakpaul/drawbench"}, "Prompts"),  # Saharia et al. 2022, 200 prompts
    "partiprompts": ({"path": "nateraw/parti-prompts"}, "Prompt"),  # Yu et al. 2022, 1,632 prompts
    # Huang et al. 2023, 300 prompts each: the validation split, as its authors report
    **{
        f"t2i-compbench:{split}": ({"path": "text", "data_files": COMPBENCH.format(f"{split}_val")}, "text")
        for split in COMPBENCH_SPLITS
    },
}
NAMES = ("shapes", *PUBLISHED)


def load_prompt_set(name: str, column: str = "text", cache_dir: str | None = None) -> list[str]:
    """The distinct prompts of a file (see `load_prompts`) or of a set of `NAMES`; shapes: the held-out captions.

    `column` is that of the prompts in a csv or jsonl file.

    Raises:
        UserError: naming `--prompts`: no such file or set, out of reach, or without any prompt.
    """
    if name == "shapes":
        return shapes.held_out_captions()
    if name not in PUBLISHED:
        if not Path(name).expanduser().is_file():
            raise UserError(
                f"--prompts {name} is neither a file nor a set{did_you_mean(name, NAMES)}; give a text file with a "
                f"prompt on each line, or one of {', '.join(NAMES)}"
            )
        try:
            loaded = load_prompts(
                prompts_file=name, dataset_name=None, dataset_config_name=None, train_data_dir=None,
                caption_column=column, max_train_samples=None, seed=0, cache_dir=cache_dir,
            )  # fmt: skip
        except UserError as error:  # it speaks of the flag that the training scripts have
            raise UserError(str(error).replace("--prompts_file", "--prompts")) from error
        return list(loaded.dataset["prompt"])
    import datasets

    source, column = PUBLISHED[name]
    try:
        rows = datasets.load_dataset(**source, split="train", cache_dir=cache_dir)[column]
    except Exception as error:
        raise UserError(
            f"--prompts {name} could not be downloaded ({first_line(error)}); check the connection, or give a file"
        ) from error
    return list(dict.fromkeys(" ".join(row.split()) for row in rows if row.strip()))
