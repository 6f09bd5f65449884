"""What `scripts/evaluate.py` refuses, in one sentence that names the flag."""

import re
import subprocess
import sys

import pytest

from scripts.evaluate import main
from sharpening.errors import UserError
from sharpening.evaluation.flags import parse_model
from tests.support.runs import ROOT

BAD = {
    "no path": (["--models", "base"], "--models base must be NAME=PATH"),
    "a name that is no folder": (["--models", "a/b=x"], "use letters, digits and _"),
    "one name twice": (["--models", "a={0}", "a={1}"], "two models have one name"),
    "no pipeline": (["--models", "a={0}", "b=."], r"--models \. holds no model_index.json"),
    "unknown search": (["--models", "a={0}", "b={0}@best:3"], "there is no search best; choose one of best_of_n"),
    "search without numbers": (["--models", "a={0}@zero_order:3"], "must be zero_order:iterations:neighbours:radius"),
    "search with words": (["--models", "a={0}@smc:many"], "must be smc:particles:temperature"),
    "search of nothing": (["--models", "a={0}@best_of_n:0"], "must be best_of_n:n, numbers above 0"),
    "search with too much": (["--models", "a={0}@demon:1:2"], "must be demon:candidates"),
    "radius beyond 1": (["--models", "a={0}@zero_order:1:2:2"], r"the radius must lie in \(0, 1\]"),
    "temperature of nothing": (["--models", "a={0}@smc:4:nan"], "must be smc:particles:temperature"),
    "odd resolution": (["--models", "a={0}", "--resolution=30"], "--resolution is 30"),
    "too many steps": (["--models", "a={0}", "--num_inference_steps=1001"], "--num_inference_steps is 1001"),
    "no image": (["--models", "a={0}", "--num_images=0"], "--num_images is 0"),
    "negative guidance": (["--models", "a={0}", "--guidance_scale=-1"], "--guidance_scale is -1"),
    "unknown reward": (["--models", "a={0}", "--reward_model=nothing"], "--reward_model"),
    "unknown metric": (["--models", "a={0}", "--metrics", "nothing"], "--metrics nothing is unknown"),
    "a name that begins with a digit": (["--models", "7b={0}"], "and a letter first"),
    "negative seed": (["--models", "a={0}", "--seed=-1"], "--seed is -1"),
    "missing prompts": (["--models", "a={0}", "--prompts=missing.txt"], "--prompts missing.txt"),
    "a study of one model": (["--models", "a={0}", "--blind=3"], "--blind needs two models"),
    "more pairs than images": (
        ["--models", "a={0}", "b={1}", "--num_images=3", "--blind=4"],
        "--blind is 4, but 3 images of 2 models make 3 pairs",
    ),
    "votes beside a model": (["--models", "a={0}", "--votes", "v.json"], "leave out --models, --prompts, --reward_mo"),
    "unknown flag": (["--models", "a={0}", "--seeds=1"], "--seeds"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_flag(case, folder, tmp_path):
    flags, said = BAD[case]
    flags = [flag.format(folder / "model0", folder / "model1") for flag in flags]
    with pytest.raises(UserError) as caught:
        main(["--output_dir", str(tmp_path), "--prompts=shapes", "--reward_model=shapes", *flags])
    assert re.search(said, str(caught.value)) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_prompts_without_the_column_name_the_flags_of_the_command(folder, tmp_path):
    (tmp_path / "mine.csv").write_text("prompt\na red circle on a white background\n")
    flags = ["--output_dir", str(tmp_path / "out"), f"--prompts={tmp_path}/mine.csv", "--reward_model=shapes"]
    with pytest.raises(UserError, match=r"--prompts \S+ has no 'text' in row 1.*--caption_column"):
        main([*flags, f"--models=a={folder}/model0"])


def test_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    flags = [f"--output_dir={tmp_path}/file/out", "--prompts=shapes", "--reward_model=shapes"]
    with pytest.raises(UserError, match=r"--output_dir \S+ cannot be written, because \S+ is not a writable folder"):
        main([*flags, "--models=a=owner/model"])


def test_disk_without_room_is_one_sentence(folder, tmp_path, file_limit):
    flags = [f"--output_dir={tmp_path}/out", "--prompts=shapes", "--reward_model=shapes", "--num_images=2"]
    flags += [f"--models=a={folder}/model0", "--num_inference_steps=1", "--guidance_scale=1"]
    with file_limit(500), pytest.raises(UserError, match=r"--output_dir \S+ has no room left \(.*free space, then"):
        main(flags)
    assert not list((tmp_path / "out").rglob("*.partial")) and main(flags) == 0


def test_path_may_hold_an_at_sign(folder, tmp_path):
    (tmp_path / "me@lab").symlink_to(folder / "model0")
    model = parse_model(f"a={tmp_path}/me@lab")
    assert (model.path, model.search) == (f"{tmp_path}/me@lab", None)


def test_script_runs_as_a_plain_file_from_anywhere(tmp_path):
    flags = ["--models=base", "--prompts=shapes", "--reward_model=shapes", "--output_dir=out"]
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: --models base must be NAME=PATH\n"


def test_help_and_refusals_wait_for_no_library():
    late = ("torch", "diffusers", "jinja2", "pandas", "matplotlib")
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({late})); sys.argv = ['evaluate.py', *sys.argv[1:]]"
    code += f"; runpy.run_path({str(ROOT / 'scripts' / 'evaluate.py')!r}, run_name='__main__')"
    said = {"--help": "--blind PAIRS", "--votes=missing.json": "--votes missing.json is no file of votes"}
    for flag, words in said.items():
        result = subprocess.run([sys.executable, "-c", code, flag], cwd=ROOT, capture_output=True, text=True)
        assert words in result.stdout + result.stderr and result.returncode == (0 if flag == "--help" else 2)


def test_adapter_cannot_be_the_base(folder, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    flags = ["--output_dir", str(tmp_path / "out"), "--prompts=shapes", "--reward_model=shapes"]
    with pytest.raises(UserError, match="is a LoRA adapter; name the pipeline"):
        main([*flags, "--models", f"a={tmp_path}/lora"])
    with pytest.raises(UserError, match="does not fit"):
        main(
            [
                *flags,
                "--models",
                f"a={folder}/model0",
                f"b={tmp_path}/lora",
                "--num_images=1",
                "--num_inference_steps=1",
            ]
        )
