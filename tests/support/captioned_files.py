"""What tests of training data share: pictures and captions in every form on disk, and encoders that count."""

import io
import json
import tarfile

import datasets
import numpy as np
import torch
from PIL import Image

from sharpening.data.captioned_images import load_captioned_images
from sharpening.data.encoding_cache import cache_latents_and_embeddings


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(number, size=(24, 16)):
    return Image.new("RGB", size, (10 * number, 255 - 10 * number, 7))


def image_folder(folder, captions, column="text"):
    """An image folder with metadata.jsonl; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, caption in enumerate(captions):
        picture(number).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", column: caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_tar(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in rows:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def texts(count):
    return [f"caption {n}" for n in range(count)]


def position_image(width, height):
    """Red is the pixel's x, green its y."""
    grid = np.zeros((height, width, 3), np.uint8)
    grid[..., 0], grid[..., 1] = np.arange(width)[None], np.arange(height)[:, None]
    return Image.fromarray(grid)


def load(tmp_path, **changes):
    options = {
        "dataset_name": None,
        "dataset_config_name": None,
        "train_data_dir": None,
        "image_column": "image",
        "caption_column": "text",
        "max_train_samples": None,
        "seed": 0,
        "cache_dir": str(tmp_path / "hf"),
    }
    return load_captioned_images(**options | changes)


class Encoders:
    """Stand-ins that keep the pixels and the text recognisable, and count what they were given."""

    def __init__(self):
        self.images, self.prompts = 0, []

    def encode_images(self, pixels):
        self.images += len(pixels)
        return torch.cat([pixels, pixels[:, :1]], 1)

    def encode_prompts(self, prompts):
        self.prompts += prompts
        codes = torch.tensor([sum(map(ord, prompt)) / 1000 for prompt in prompts])
        return codes[:, None, None].expand(-1, 77, 8), codes[:, None].expand(-1, 4)


def cache(tmp_path, dataset, encoders=None, **changes):
    """The cached data and the encoders that were at its disposal."""
    encoders = encoders or Encoders()
    options = {
        "image_column": "image",
        "caption_column": "text",
        "resolution": 16,
        "center_crop": False,
        "random_flip": True,
        "seed": 0,
        "encode_images": encoders.encode_images,
        "encode_prompts": encoders.encode_prompts,
        "batch_size": 2,
        "key": {"model": "m"},
        "cache_dir": str(tmp_path / "cache"),
        "dtype": torch.float32,
    }
    return cache_latents_and_embeddings(dataset, **options | changes), encoders


def dataset_of(images, captions):
    stored = [{"bytes": image if isinstance(image, bytes) else encoded(image), "path": None} for image in images]
    made = datasets.Dataset.from_dict({"image": stored, "text": captions})
    return made.cast_column("image", datasets.Image(decode=False))


def parquet(folder, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"image": [encoded(picture(n)) for n in range(3)], "text": ["c0", "c1", "c2"]} | columns
    datasets.Dataset.from_dict(rows).to_parquet(str(folder / "train.parquet"))
    return folder / "train.parquet"


def write_pairs(folder, rows, as_images=False, **columns):
    """A parquet folder in the columns of Pick-a-Pic, of rows (image, image, label, caption); returns the folder."""
    first, second, labels, captions = zip(*rows, strict=True)
    images = {name: [encoded(image) for image in of] for name, of in (("jpg_0", first), ("jpg_1", second))}
    made = datasets.Dataset.from_dict({**images, "label_0": list(labels), "caption": list(captions)} | columns)
    if as_images:
        for name in images:
            stored = [{"bytes": data, "path": None} for data in made[name]]
            made = made.remove_columns(name).add_column(name, stored).cast_column(name, datasets.Image())
    folder.mkdir(parents=True, exist_ok=True)
    made.to_parquet(str(folder / "train.parquet"))
    return folder


def image_parquet(folder):
    folder.mkdir(parents=True)
    made = dataset_of([picture(n) for n in range(3)], ["c0", "c1", "c2"])
    made.cast_column("image", datasets.Image()).to_parquet(str(folder / "train.parquet"))
    return folder


def _saved(folder, as_dict):
    made = dataset_of([picture(n) for n in range(3)], ["c0", "c1", "c2"]).cast_column("image", datasets.Image())
    (datasets.DatasetDict({"train": made, "test": made.select([0])}) if as_dict else made).save_to_disk(str(folder))
    return folder


def _tars(folder):
    for number in range(3):
        rows = [
            (f"{number}.png", encoded(picture(number))),
            (f"{number}.txt", f"c{number}".encode()),
            (f"{number}.json", json.dumps({"caption": f"c{number}", "width": 24}).encode()),
        ]
        write_tar(folder / f"shard-{number}.tar", rows)
    return folder


def _paths_parquet(folder):
    image_folder(folder / "images", ["", "", ""])
    return parquet(folder, image=[str(folder / "images" / f"{n}.png") for n in range(3)])


TAR = {"image_column": "png", "caption_column": "txt"}
KINDS = {
    "train_data_dir": lambda d: {"train_data_dir": image_folder(d, ["c0", "c1", "c2"])},
    "odd folder name": lambda d: {"train_data_dir": image_folder(d / "a [1] *", ["c0", "c1", "c2"])},
    "own column": lambda d: {"train_data_dir": image_folder(d, ["c0", "c1", "c2"], "cap"), "caption_column": "cap"},
    "image folder by name": lambda d: {"dataset_name": image_folder(d, ["c0", "c1", "c2"])},
    "parquet file of bytes": lambda d: {"dataset_name": parquet(d)},
    "parquet file of paths": lambda d: {"dataset_name": _paths_parquet(d)},
    "parquet folder of images": lambda d: {"dataset_name": image_parquet(d)},
    "parquet glob": lambda d: {"dataset_name": parquet(d).with_name("tr*.parquet")},
    "saved Dataset": lambda d: {"dataset_name": _saved(d, False)},
    "saved DatasetDict": lambda d: {"dataset_name": _saved(d, True)},
    "tar glob": lambda d: {"dataset_name": _tars(d) / "*.tar", **TAR},
    "tar folder": lambda d: {"dataset_name": _tars(d), **TAR},
    "tar json": lambda d: {"dataset_name": _tars(d), "image_column": "png", "caption_column": "json.caption"},
}
