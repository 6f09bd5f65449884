"""Pairs of images that people compared, in the columns of Pick-a-Pic (Kirstain et al., arXiv 2305.01569)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor

from sharpening.data.captioned_images import read_captions, row_name, undecoded
from sharpening.data.dataset_loading import load_train_split, with_columns
from sharpening.data.encoding_cache import CachedData
from sharpening.errors import UserError, shortened
from sharpening.progress import progress

IMAGES = ("jpg_0", "jpg_1")
LABEL = "label_0"  # 1: the first image is preferred, 0: the second; anything between is a tie


class PreferencePairs(NamedTuple):
    """Compared pairs without ties, and how they came about in one line."""

    dataset: datasets.Dataset  # columns `IMAGES` (undecoded: {"bytes", "path"}) and the captions
    first_is_best: list[bool]  # of each row: whether its first image is preferred
    description: str


def load_preference_pairs(
    *,
    dataset_name: str,
    dataset_config_name: str | None,
    caption_column: str,
    max_train_samples: int | None,
    seed: int,
    cache_dir: str | None,
) -> PreferencePairs:
    """The pairs of the training split that are no tie; images are bytes or images, and are not read.

    Args:
        dataset_name, dataset_config_name, caption_column: as for `load_captioned_images`.
        max_train_samples: that many pairs (at least 1), after a shuffle by `seed`.

    Raises:
        UserError: no such data, columns are missing, a label is no number in [0, 1], a caption is no text, or all
            pairs are ties.
    """
    dataset = load_train_split(dataset_name, dataset_config_name, None, cache_dir)
    names = (*IMAGES, LABEL, caption_column)
    missing = [name for name in names if name not in dataset.column_names]
    if missing:
        raise UserError(
            f"--dataset_name '{dataset_name}' has no column {' and no '.join(missing)}; pairs lie in "
            f"{', '.join(IMAGES)} and {LABEL}, as in Pick-a-Pic, and --caption_column names that of the captions: "
            f"rename its columns, which are {', '.join(dataset.column_names)}, or train on its prompts by "
            "baselines/diffusion_dpo.py."
        )
    dataset = with_columns(dataset, {f"--dataset_name {name}": name for name in names})
    for name in IMAGES:
        dataset = undecoded(dataset, name)
    labels = _read_labels(dataset)
    decided = [row for row, label in enumerate(labels) if label in (0, 1)]
    if not decided:
        raise UserError(f"--dataset_name '{dataset_name}' holds only ties; give pairs whose {LABEL} is 0 or 1.")
    described = (
        f"{len(decided)} pairs of {dataset_name} ({len(labels)} read: {len(labels) - len(decided)} ties left out)"
    )
    dataset, labels = dataset.select(decided), [labels[row] for row in decided]
    if max_train_samples is not None and max_train_samples < len(decided):
        chosen = torch.randperm(len(decided), generator=torch.Generator().manual_seed(seed))[:max_train_samples]
        dataset, labels = dataset.select(chosen.tolist()), [labels[row] for row in chosen.tolist()]
        described = f"{max_train_samples} of {described}"
    bar = progress(total=len(dataset), desc="checking captions", unit="row", delay=1)
    for _ in read_captions(dataset, caption_column, bar):
        pass
    return PreferencePairs(dataset, [label == 1 for label in labels], described)


def _read_labels(dataset: datasets.Dataset) -> list[float]:
    """The label of every row.

    Raises:
        UserError: one is no number in [0, 1].
    """
    labels = dataset.select_columns([LABEL]).with_format("arrow")
    values = [value for table in labels.iter(batch_size=1000) for value in table.column(0).to_pylist()]
    for row, value in enumerate(values):
        if not (isinstance(value, (bool, int, float)) and 0 <= value <= 1):
            raise UserError(
                f"--dataset_name: {LABEL} holds {shortened(value)} in {row_name(dataset, row)}; it must be 1 where "
                f"{IMAGES[0]} is preferred, 0 where {IMAGES[1]} is, and 0.5 for a tie: mend the row or leave it out."
            )
    return values


class CachedPairs(torch.utils.data.Dataset):
    """The two encoded images of every pair, read by (row, draw number) as `CachedData` is: the preferred one first."""

    def __init__(self, images: Sequence[CachedData], first_is_best: Sequence[bool]) -> None:
        """images: the two of every pair, encoded with the same captions and the same seed."""
        self.images, self.first_is_best = images, first_is_best

    def __len__(self) -> int:
        return len(self.first_is_best)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        """As `CachedData`, but `latents` (2, 4, h, w) and `time_ids` (2, 6): of the preferred image and of the other.

        Both were cropped at one place and mirrored alike if they are of one size.
        """
        row, _ = draw
        first, second = self.images if self.first_is_best[row] else reversed(self.images)
        best: Mapping[str, Any] = first[draw]
        both: dict[str, Tensor] = {name: torch.stack([best[name], part]) for name, part in second.image(row).items()}
        return {**best, **both}
