"""Prompts without images: every form they come in, what is left out and reported, and their cache."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sharpening.data.encoding_cache import cache_embeddings, collate
from sharpening.data.prompts import load_prompts
from sharpening.draws import DrawSampler
from sharpening.errors import UserError

PROMPTS = ["a cat", 'a "quoted", comma', "ein Bär, ünïcode 🐻"]


def load(**changes):
    options = {
        "prompts_file": None, "dataset_name": None, "dataset_config_name": None, "train_data_dir": None,
        "caption_column": "text", "max_train_samples": None, "seed": 0, "cache_dir": None,
    }  # fmt: skip
    loaded = load_prompts(**options | changes)
    return list(loaded.dataset["prompt"]), loaded.description


@pytest.mark.parametrize("form", ["txt", "no suffix", "windows", "bom", "csv", "jsonl", "list of captions"])
def test_every_form_of_file_gives_the_same_prompts(form, tmp_path):
    path = tmp_path / ("prompts" if form == "no suffix" else f"prompts.{form if form in ('csv', 'jsonl') else 'txt'}")
    text = "\n".join(PROMPTS) + "\n"
    if form == "windows":
        path.write_bytes(text.replace("\n", "\r\n").encode())
    elif form == "bom":
        path.write_text(text, encoding="utf-8-sig")
    elif form == "csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "text"), *enumerate(PROMPTS)])
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps({"text": prompt}, ensure_ascii=False) for prompt in PROMPTS) + "\n\n")
    elif form == "list of captions":
        path = path.with_suffix(".jsonl")
        path.write_text(json.dumps({"text": PROMPTS}) + "\n")
    else:
        path.write_text(text)
    prompts, description = load(prompts_file=str(path))
    assert prompts == PROMPTS
    assert description == (f"3 prompts of {path} (3 read: 0 empty and 0 repeated left out, 0 of several lines joined)")


def test_several_lines_are_joined_and_empty_and_repeated_ones_left_out_and_counted(tmp_path):
    path = tmp_path / "prompts.jsonl"
    values = ["a cat\n on a\r\nmat", "a dog", None, "", " \n ", "a dog ", "a cat on a mat", ["a bird", "a dog"]]
    path.write_text("\n".join(json.dumps({"text": value}) for value in values))
    prompts, description = load(prompts_file=str(path))
    assert prompts == ["a cat on a mat", "a dog", "a bird"]
    assert description == (f"3 prompts of {path} (9 read: 3 empty and 3 repeated left out, 1 of several lines joined)")


def test_quoted_lines_of_a_csv_are_one_prompt(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes(b'caption\r\n"a cat\r\non a mat"\r\na dog\r\n')
    assert load(prompts_file=str(path), caption_column="caption")[0] == ["a cat on a mat", "a dog"]


@pytest.mark.parametrize("kind", ["parquet", "saved", "image folder"])
def test_caption_column_of_a_data_set(kind, tmp_path):
    captions = ["a cat", "a dog", "a cat", ""]
    if kind == "image folder":
        for row, caption in enumerate(captions):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{row}.png")
            with (tmp_path / "metadata.jsonl").open("a") as file:
                file.write(json.dumps({"file_name": f"{row}.png", "text": caption}) + "\n")
        flags = {"train_data_dir": str(tmp_path)}
    else:
        dataset = datasets.Dataset.from_dict({"text": captions, "other": [1, 2, 3, 4]})
        flags = {"dataset_name": str(tmp_path / "data.parquet")}
        if kind == "parquet":
            dataset.to_parquet(flags["dataset_name"])
        else:
            dataset.save_to_disk(flags["dataset_name"])
    prompts, description = load(**flags, cache_dir=str(tmp_path / "cache"))
    assert prompts == ["a cat", "a dog"]
    assert "(4 read: 1 empty and 1 repeated left out" in description


def test_random_subset_depends_on_the_seed_alone(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt {number}" for number in range(100)))
    first, again, other = (load(prompts_file=str(path), max_train_samples=10, seed=seed)[0] for seed in (0, 0, 1))
    assert len(first) == 10 and first == again != other
    assert len(load(prompts_file=str(path), max_train_samples=1000)[0]) == 100


def test_cache_is_made_once_and_read_back_by_row_and_draw(tmp_path):
    encoded = []

    def encode(captions):
        encoded.extend(captions)
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return lengths.view(-1, 1, 1).expand(-1, 3, 2), torch.ones(len(captions), 4)

    options = {
        "encode_prompts": encode, "batch_size": 2, "key": {"text": "model"}, "seed": 0, "cache_dir": str(tmp_path),
        "dtype": torch.float32,
    }  # fmt: skip
    dataset = datasets.Dataset.from_dict({"prompt": PROMPTS})
    cached = cache_embeddings(dataset, **options)
    again = cache_embeddings(dataset, **options)
    assert encoded == PROMPTS and len(cached) == len(again) == 3
    sampler = DrawSampler(3, 3, 0, 1, 0, 0, 1)
    (batch,) = DataLoader(again, batch_sampler=sampler, collate_fn=collate)
    assert sorted(batch["caption"]) == sorted(PROMPTS)
    assert batch["prompt_embeds"][:, 0, 0].tolist() == [len(caption) for caption in batch["caption"]]
    assert set(batch) == {"caption", "draw", "prompt_embeds", "pooled_prompt_embeds"}  # no latents, no time ids
    cache_embeddings(dataset, **{**options, "key": {"text": "another model"}})
    assert len(encoded) == 6


def test_unreadable_file_names_the_flag(tmp_path):
    with pytest.raises(UserError, match=r"--prompts_file .*no\.txt cannot be read"):
        load(prompts_file=str(tmp_path / "no.txt"))
