"""Images laid out for published scorers."""

import json

import pytest

from scripts.evaluate import main
from sharpening.errors import UserError
from tests.support.evaluation import PROMPTS


def test_export_for_t2i_compbench(evaluate, folder, tmp_path, capsys):
    evaluate(("base", folder / "model0"), export="t2i-compbench", num_images=6)
    samples = tmp_path / "out" / "t2i-compbench" / "base" / "samples"
    names = sorted((path.name for path in samples.iterdir()), key=lambda name: int(name.split("_")[-1].split(".")[0]))
    # The scorers read the prompt before the underscore and sort by the number behind it: all of one prompt in a row.
    assert [name.split("_")[0] for name in names] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert names[0] == f"{PROMPTS[0]}_000000.png"
    (third,) = (tmp_path / "out" / "images").glob("base-*/00002-*.png")
    assert (samples / names[1]).read_bytes() == third.read_bytes()
    commands = capsys.readouterr().out
    assert f"python BLIP_vqa.py --out_dir={samples.parent}" in commands and "2D_spatial_eval.py" in commands
    evaluate(("base", folder / "model0"), export="t2i-compbench", num_images=2)
    assert len(list(samples.iterdir())) == 2  # nothing is left of an earlier export


def test_export_for_geneval(evaluate, folder, tmp_path, capsys):
    rows = [{"tag": "colors", "include": [{"class": "circle", "count": 1}], "prompt": prompt} for prompt in PROMPTS]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    evaluate(("base", folder / "model0"), export="geneval", prompts=path, num_images=4)
    root = tmp_path / "out" / "geneval" / "base"
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) == [
        f"0000{n}/{file}" for n in (0, 1) for file in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert [json.loads((root / f"0000{n}" / "metadata.jsonl").read_text()) for n in (0, 1)] == rows
    (fourth,) = (tmp_path / "out" / "images").glob("base-*/00003-*.png")
    assert (root / "00001" / "samples" / "0001.png").read_bytes() == fourth.read_bytes()
    assert f"evaluate_images.py {root}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("geneval", "a cat", "needs --prompts evaluation_metadata.jsonl"),
        ("t2i-compbench", "a_cat", "an underscore"),
        ("t2i-compbench", "a\nb\nc", r"--num_images 400 does not give each of the 3 prompts .* use 30 \(10 each"),
    ],
)
def test_prompts_that_a_scorer_would_misread_are_refused(kind, text, said, folder, tmp_path):
    (tmp_path / "p.txt").write_text(text)
    flags = ["--models", f"a={folder}/model0", f"--prompts={tmp_path}/p.txt", "--reward_model=jpeg_compressibility"]
    with pytest.raises(UserError, match=said):
        main([*flags, f"--export={kind}", f"--output_dir={tmp_path}/out"])
    assert not (tmp_path / "out").exists()
