"""What is encoded, kept and read back. Encoders are plain functions; every cache lives in the test's own folder."""

import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sharpening.data.cropping import crop_and_resize
from sharpening.data.encoding_cache import collate
from sharpening.draws import DrawSampler
from sharpening.errors import UserError
from tests.support.captioned_files import (
    KINDS,
    Encoders,
    cache,
    dataset_of,
    encoded,
    image_folder,
    load,
    parquet,
    picture,
    position_image,
    texts,
)

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.usefixtures("no_progress_bars")


@pytest.fixture
def five(tmp_path):
    return dataset_of([position_image(40 + n, 24) for n in range(5)], texts(5))


def test_the_second_call_encodes_nothing(tmp_path, five):
    first, encoders = cache(tmp_path, five)
    assert encoders.images == 5 and encoders.prompts == texts(5)
    second, unused = cache(tmp_path, five, batch_size=3)
    assert unused.images == 0 and not unused.prompts
    for row in range(5):
        a, b = first[row, 0], second[row, 0]
        assert all(torch.equal(a[name], b[name]) for name in a if isinstance(a[name], torch.Tensor))


# What changed, and whether images and texts must be encoded again.
KEY_CHANGES = {
    "resolution": ({"resolution": 8}, True, False),
    "center_crop": ({"center_crop": True}, True, False),
    "random_flip": ({"random_flip": False}, True, False),
    "seed": ({"seed": 1}, True, False),
    "dtype": ({"dtype": torch.float16}, True, True),
    "model": ({"key": {"model": "other"}}, True, True),
    "vae": ({"key": {"model": "m", "vae": "v"}}, True, False),
    "text encoder": ({"key": {"model": "m", "text_encoder": "t"}}, False, True),
    "caption column": ({"caption_column": "other"}, False, True),
    "image column": ({"image_column": "second"}, True, False),
    "batch size": ({"batch_size": 5}, False, False),
}


@pytest.mark.parametrize("name", KEY_CHANGES)
def test_a_change_encodes_again_exactly_what_it_shapes(tmp_path, five, name):
    changes, images, prompts = KEY_CHANGES[name]
    five = five.add_column("other", [f"other {n}" for n in range(5)]).add_column("second", five["image"][:])
    cache(tmp_path, five)
    _, encoders = cache(tmp_path, five, **changes)
    assert (encoders.images > 0, len(encoders.prompts) > 0) == (images, prompts)


def test_the_seed_shapes_nothing_when_nothing_is_random(tmp_path, five):
    cache(tmp_path, five, center_crop=True, random_flip=False)
    _, encoders = cache(tmp_path, five, center_crop=True, random_flip=False, seed=1)
    assert encoders.images == 0


def test_other_rows_are_another_cache(tmp_path, five):
    cache(tmp_path, five)
    cached, encoders = cache(tmp_path, five.select([1, 3]))
    assert encoders.images == 2 and cached[1, 0]["caption"] == "caption 3"


def _later(path):
    """Give a file just written a time of its own, whatever the file system's resolution."""
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 10**9))


def _change_folder_image(folder):
    picture(9).save(folder / "1.png")
    _later(folder / "1.png")


def _change_parquet(folder):
    parquet(folder, image=[encoded(picture(n)) for n in (0, 9, 2)])
    _later(folder / "train.parquet")


def _change_path_image(folder):
    picture(9).save(folder / "images" / "1.png")
    _later(folder / "images" / "1.png")


def _save_with_one_fingerprint(folder, numbers):
    """As a generator function does that reads other files from one day to the next."""
    shutil.rmtree(folder, ignore_errors=True)
    made = dataset_of([picture(n) for n in numbers], ["c0", "c1", "c2"]).cast_column("image", datasets.Image())
    made._fingerprint = "0123456789abcdef"
    made.save_to_disk(str(folder))
    return {"dataset_name": folder}


CHANGED_FILES = {
    "image folder": (KINDS["train_data_dir"], _change_folder_image),
    "image folder by name": (KINDS["image folder by name"], _change_folder_image),
    "parquet": (KINDS["parquet file of bytes"], _change_parquet),
    "files that a parquet names": (KINDS["parquet file of paths"], _change_path_image),
    "saved": (
        lambda d: _save_with_one_fingerprint(d, (0, 1, 2)),
        lambda d: _save_with_one_fingerprint(d, (0, 9, 2)),
    ),
}


@pytest.mark.parametrize("kind", CHANGED_FILES)
def test_a_changed_file_is_encoded_again(tmp_path, kind):
    make, change = CHANGED_FILES[kind]
    options = {name: str(value) for name, value in make(tmp_path / "data").items()}

    def red(changes=options):
        cached, encoders = cache(tmp_path, load(tmp_path, **changes))
        return round(float(cached[1, 0]["latents"][0, 0, 0] + 1) * 127.5), encoders

    assert red()[0] == 10
    assert red()[1].images == 0
    change(tmp_path / "data")
    value, encoders = red()
    assert value == 90 and encoders.images == 3 and not encoders.prompts


def test_crops_do_not_depend_on_the_batch_size(tmp_path, five):
    a, _ = cache(tmp_path / "a", five, batch_size=1)
    b, _ = cache(tmp_path / "b", five, batch_size=4)
    for row in range(5):
        assert torch.equal(a[row, 0]["latents"], b[row, 0]["latents"])
        assert torch.equal(a[row, 0]["time_ids"], b[row, 0]["time_ids"])
    assert len({tuple(a[row, 0]["time_ids"].tolist()[2:4]) for row in range(5)}) > 1


def test_stored_time_ids_are_those_of_the_stored_latent(tmp_path):
    cached, _ = cache(tmp_path, dataset_of([position_image(80, 16)] * 12, texts(12)), center_crop=False)
    flips = set()
    for row in range(12):
        item = cached[row, 0]
        x = ((item["latents"][0] + 1) * 127.5).round()[0]
        left = item["time_ids"][3] + torch.arange(16)
        flipped = bool(x[0] > x[1])
        flips.add(flipped)
        assert torch.equal(x, 79 - left if flipped else left)
    assert flips == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stored_row_is_the_encoders_output_in_dtype(tmp_path, five, dtype):
    cached, encoders = cache(tmp_path, five, dtype=dtype, center_crop=True, random_flip=False)
    item = cached[4, 17]
    pixels, time_ids = crop_and_resize(position_image(44, 24), 16, True, False, torch.Generator())
    embeds, pooled = encoders.encode_prompts(["caption 4"])
    assert torch.equal(item["latents"], torch.cat([pixels, pixels[:1]]).to(dtype))
    assert torch.equal(item["prompt_embeds"], embeds[0].to(dtype)) and item["prompt_embeds"].shape == (77, 8)
    assert torch.equal(item["pooled_prompt_embeds"], pooled[0].to(dtype))
    assert item["time_ids"].dtype == torch.float32 and item["time_ids"].tolist() == list(map(float, time_ids))
    assert item["caption"] == "caption 4" and item["draw"] == 17


def test_a_caption_is_encoded_once_and_a_list_offers_a_choice(tmp_path):
    captions = [["a", "b", "c"], ["b"], ["c", "a"], ["d", "d"]]
    dataset = dataset_of([picture(n) for n in range(4)], captions)
    cached, encoders = cache(tmp_path, dataset, batch_size=3)
    assert encoders.prompts == ["a", "b", "c", "d"]
    chosen = Counter(cached[0, draw]["caption"] for draw in range(300))
    assert set(chosen) == {"a", "b", "c"} and min(chosen.values()) > 60
    for draw in range(20):
        item = cached[0, draw]
        assert item["caption"] == cached[0, draw]["caption"]
        assert torch.equal(item["pooled_prompt_embeds"], encoders.encode_prompts([item["caption"]])[1][0])
    other, unused = cache(tmp_path, dataset, seed=1)
    assert not unused.prompts
    assert [other[0, d]["caption"] for d in range(20)] != [cached[0, d]["caption"] for d in range(20)]


def test_cached_data_survives_pickling(tmp_path, five):
    cached, _ = cache(tmp_path, five)
    assert torch.equal(pickle.loads(pickle.dumps(cached))[2, 1]["latents"], cached[2, 1]["latents"])
    assert len(pickle.dumps(cached)) < 100_000


DAMAGED = {
    "no image at all": b"hello",
    "empty": b"",
    "cut short": encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900],
    "broken chunk": encoded(position_image(40, 40)).replace(b"IDAT", b"IDAX"),
    "narrow": encoded(Image.new("L", (1, 60000)), "PNG"),
    "float": encoded(Image.new("F", (16, 16)), "TIFF"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_image_is_named(tmp_path, damage):
    dataset = dataset_of([picture(0), picture(1), DAMAGED[damage]], texts(3))
    with pytest.raises(UserError, match="--image_column 'image': the image in row 2 of the data set cannot be read"):
        cache(tmp_path, dataset, resolution=64)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_missing_image_is_named(tmp_path):
    folder = image_folder(tmp_path / "d", texts(3))
    (folder / "1.png").unlink()
    with pytest.raises(UserError, match=r"row 1 of the data set \('.*1.png'\) cannot be read.*No such file"):
        cache(tmp_path, load(tmp_path, train_data_dir=str(folder)))
    rows = {"image": [{"bytes": encoded(picture(0)), "path": None}, None], "text": texts(2)}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    with pytest.raises(UserError, match="--image_column 'image' holds no image in row 1"):
        cache(tmp_path, dataset)


def test_values_that_are_not_finite_are_refused(tmp_path, five):
    encoders = Encoders()
    encoders.encode_images = lambda pixels: torch.full((len(pixels), 4, 2, 2), 1e6)
    with pytest.raises(UserError, match=r"--mixed_precision: encoding images.*--pretrained_vae"):
        cache(tmp_path, five, encoders, dtype=torch.float16)


def test_a_cache_folder_that_takes_no_files_is_named(tmp_path, five):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir: the cache cannot be written"):
        cache(tmp_path, five, cache_dir=str(tmp_path / "file"))


class Fatal(Encoders):
    """Dies, uncleanly, in its second batch."""

    def __init__(self, during):
        super().__init__()
        self.during = during

    def encode_images(self, pixels):
        if self.during == "images" and self.images:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_images(pixels)

    def encode_prompts(self, prompts):
        if self.during == "prompts" and self.prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_prompts(prompts)


@pytest.mark.parametrize("during", ["images", "prompts"])
def test_a_killed_run_leaves_no_cache(tmp_path, five, during):
    child = FORK.Process(target=cache, args=(tmp_path, five, Fatal(during)))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert list(tmp_path.rglob("*.partial"))
    cached, encoders = cache(tmp_path, five)
    assert encoders.images == (5 if during == "images" else 0) and len(encoders.prompts) == 5
    assert [cached[row, 0]["caption"] for row in range(5)] == texts(5)
    assert not list(tmp_path.rglob("*.partial"))


def _cache_and_count(tmp_path, dataset, barrier, queue):
    barrier.wait()
    cached, encoders = cache(tmp_path, dataset)
    queue.put((encoders.images, len(encoders.prompts), float(cached[4, 0]["latents"].sum())))


def test_of_two_processes_at_once_one_encodes(tmp_path, five):
    barrier, queue = FORK.Barrier(2), FORK.Queue()
    children = [FORK.Process(target=_cache_and_count, args=(tmp_path, five, barrier, queue)) for _ in range(2)]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    assert sum(images for images, *_ in results) == 5 and sum(prompts for _, prompts, _ in results) == 5
    assert results[0][2] == results[1][2]


def _private_mib():
    """This process's own memory, memory-mapped files aside."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory use from /proc")
def test_memory_stays_bounded_while_hundreds_of_megabytes_pass(tmp_path):
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)))
    rows = 1000
    with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "big.arrow"), writer_batch_size=50) as writer:
        for row in range(rows):
            writer.write({"image": {"bytes": noise, "path": None}, "text": f"caption {row}"})
        writer.finalize()
    dataset = datasets.Dataset.from_file(str(tmp_path / "big.arrow"))
    usage = []

    class Heavy(Encoders):
        def encode_images(self, pixels):
            usage.append(_private_mib())
            return torch.zeros(len(pixels), 4, 100, 100)

        def encode_prompts(self, prompts):
            usage.append(_private_mib())
            return torch.zeros(len(prompts), 77, 1024), torch.zeros(len(prompts), 64)

    gc.collect()
    before = _private_mib()
    cached, _ = cache(tmp_path, dataset, Heavy(), batch_size=8)
    for row in range(0, rows, 7):
        cached[row, row]
        usage.append(_private_mib())
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*.arrow")) / 2**20
    shutil.rmtree(tmp_path)  # pytest would keep it for three runs
    assert stored > 500
    assert max(usage) - before < 200


def test_workers_change_nothing(tmp_path):
    dataset = dataset_of([picture(n) for n in range(5)], [["x", "y", f"z{n}"] for n in range(5)])
    cached, _ = cache(tmp_path, dataset)
    batches = {}
    for workers in (0, 2):
        loader = DataLoader(
            cached, batch_sampler=DrawSampler(5, 3, 0, 1, 0, 0, 6), collate_fn=collate, num_workers=workers
        )
        batches[workers] = list(loader)
    assert len(batches[0]) == 6
    for one, two in zip(batches[0], batches[2], strict=True):
        assert one.keys() == two.keys() and one["caption"] == two["caption"]
        assert all(torch.equal(one[name], two[name]) for name in one if name != "caption")
    batch = batches[0][0]
    assert batch["draw"].dtype == torch.int64 and batch["draw"].tolist() == [0, 1, 2]
    assert batch["latents"].shape == (3, 4, 16, 16) and batch["time_ids"].shape == (3, 6)
    assert batch["prompt_embeds"].shape == (3, 77, 8) and batch["pooled_prompt_embeds"].shape == (3, 4)


@pytest.mark.slow
def test_importing_the_modules_loads_no_model_library():
    code = "import sys; from sharpening.data import captioned_images, encoding_cache, prompts\n"
    code += "print([m for m in ('transformers', 'diffusers') if m in sys.modules])"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
