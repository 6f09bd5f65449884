"""The pages say what is so: links lead somewhere, commands parse, Python runs, and memory is what the code says."""

import functools
import importlib
import inspect
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from reward import load_reward
from sharpening import flags as declarations
from sharpening.errors import UserError
from sharpening.model_source import Source
from sharpening.running import launching
from tests.support.runs import ROOT, SCRIPTS, metrics
from tiny_world import shapes
from tiny_world.grader_server import Action

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
LAUNCHERS = {"quiet", "cpu", "venv", "node_rank"}  # flags of other programs that the text speaks of


def in_project(page):
    """A page's path, as pytest shows it."""
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """The texts of a page's code blocks in a language, in order."""
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def prose(page):
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


def spans(page):
    """What stands in backticks outside code blocks, each on one line."""
    return [" ".join(text.split()) for _, text in SPAN.findall(prose(page))]


# -------------------------------------------------------------------------------------------------------------- links


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = []
    for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return found


def broken_links(page):
    """Relative links of a page that lead nowhere."""
    broken = []
    for link in LINK.findall(SPAN.sub("", prose(page))):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=in_project)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `--b` (c)\n[1](#a---b-c) [2](#a) [3](no.md) [4](page.md#a---b-c) [5](page.md#x) `[6](no)`\n")
    assert broken_links(page) == ["#a", "no.md", "page.md#x"]


def test_every_page_is_in_the_index():
    index = LINK.findall((ROOT / "docs" / "README.md").read_text())
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"} <= set(index)


FOLDERS = "baselines|benchmarks|docs|mllm_template|scripts|sharpening|study|tests|tiny_world"


@pytest.mark.parametrize("page", PAGES, ids=in_project)
def test_files_that_are_named_exist(page):
    named = [span for span in spans(page) if re.fullmatch(rf"({FOLDERS})/[\w./]*", span)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_pages_that_code_names_exist():
    folders = [ROOT / name for name in FOLDERS.split("|")]
    sources = [*ROOT.glob("*.py"), *(path for kind in ("*.py", "*.sh") for of in folders for path in of.rglob(kind))]
    assert len(sources) > 100
    named = {
        (str(path.relative_to(ROOT)), name)
        for path in sources
        for name in re.findall(r"docs/\w+\.md", path.read_text())
        if not (ROOT / name).exists()
    }
    assert named == set()


# ----------------------------------------------------------------------------------------------------------- commands


def user_files():
    """Names of files that blocks are to be saved as, which their first line says: `# rwr.py`."""
    first = [text.splitlines()[0] for page in PAGES for text in blocks(page, "python")]
    return {line.removeprefix("# ") for line in first if re.fullmatch(r"# \w+\.py", line)}


def commands(text):
    """Each simple command of a shell text as (script of this project, words behind it); others are left out.

    A script that is named by another one (`scripts/slurm.sh`) is the one that counts. A file that is neither here nor
    among `user_files` is found too, for the test to refuse it.
    """
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|<>"):
                named = [at for at, each in enumerate(words) if re.fullmatch(r"[\w./]+\.(py|sh)", each)]
                module = [at + 1 for at, each in enumerate(words[:-1]) if each == "-m" and words[at + 1] == "study"]
                for at in (named + module)[-1:]:
                    yield words[at], words[at + 1 :]
                words = []
            else:
                words.append(word)


@functools.cache
def scripts_of_pages():
    """The scripts of this project that code blocks name."""
    named = {script for page in PAGES for text in blocks(page, "bash") for script, _ in commands(text)}
    return sorted(name for name in named if name == "study" or (ROOT / name).exists())


@functools.cache
def declared(script):
    """The flags, without dashes, that a script of this project takes, by its own `--help`; a shell script takes those
    of the script that it hands its own to, and what it reads itself."""
    if script.endswith(".sh"):
        text = (ROOT / script).read_text()
        passed = [words[0] for words in commands_that_pass_flags_on(text)]
        return set(re.findall(r"--([\w-]+)", text)).union(*map(declared, passed))
    out = io.StringIO()
    with patch.object(sys, "argv", [script, "--help"]), redirect_stdout(out), pytest.raises(SystemExit):
        if script == "study":
            runpy.run_module(script, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+(?:, --[\w-]+)*)", out.getvalue(), re.MULTILINE)
    return {name.removeprefix("--") for option in options for name in option.split(", ")}


def commands_that_pass_flags_on(text):
    """(script, words behind it) of the commands of a shell script that end in its own flags."""
    return [(script, words) for script, words in commands(text) if words and words[-1] == "$@"]


def trained_by(script):
    """The training script that a command launches, with the flags that a shell script gives it; None: another one."""
    if script.endswith(".sh") and (ROOT / script).exists():
        found = commands_that_pass_flags_on((ROOT / script).read_text())
        return next(((name, words) for name, words in found if name in SCRIPTS.values()), None)
    return (script, []) if script in SCRIPTS.values() else None


def mistakes(script, words):
    """What is wrong with the flags of a command, in sentences."""
    words = [word for word in words if not word.endswith("...") and "$@" not in word and "[@]" not in word]
    if script in user_files():
        return []  # run below
    if not (ROOT / script).exists():
        return [f"{script} does not exist"]
    training = trained_by(script)
    if training is None:
        given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        return [f"{script} has no --{name}" for name in sorted(given - declared(script))]
    name, before = training
    groups = importlib.import_module(name.removesuffix(".py").replace("/", ".")).FLAGS
    parser = declarations.make_parser("", groups)
    before = [word for word in before if "$@" not in word and "[@]" not in word]
    try:
        args = parser.parse_args(["--pretrained_model_name_or_path=MODEL", *before, *words])
        for flag, of in declarations.every_flag(groups).items():
            of.check(getattr(args, flag))
    except UserError as error:
        return [f"{script}: {error}"]
    return []


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "scripts").glob("*.sh"))], ids=in_project)
def test_commands_parse(page):
    texts = blocks(page, "bash") if page.suffix == ".md" else [page.read_text()]
    assert [said for text in texts for command in commands(text) for said in mistakes(*command)] == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bash scripts/sft.sh --reward_modell=clip", "--reward_modell"),
        ("PROMPTS_FILE=p.txt bash scripts/rlhf.sh --reward_on=samples", "--reward_on"),
        ("accelerate launch --quiet train_sft_diffusion_sharpening_sdxl.py --beta_dpo=5", "--beta_dpo"),
        ("torchrun --nproc_per_node=2 baselines/d3po.py \\\n  --ratio_clip=2 ...", "--ratio_clip is 2"),
        ("sbatch --nodes=2 scripts/slurm.sh train_sft_diffusion_sharpening_sdxl.py --train_row=1", "--train_row"),
        ("cd x; python reward.py --image DIR | head", "--image"),
        ("bash scripts/evaluate.sh --model base=MODEL", "--model"),
        ("bash scripts/study.sh --quickly", "--quickly"),
        ("python scripts/evaluat.py", "evaluat.py does not exist"),
    ],
)
def test_mistakes_are_found(command, said):
    found = [sentence for each in commands(command) for sentence in mistakes(*each)]
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize("page", PAGES, ids=in_project)
def test_flags_in_the_text_exist(page):
    """In backticks: those behind a script's name are its own, all others some script's."""
    every = LAUNCHERS | {"share_noise_in_pair", "no-NAME"}
    every = every.union(*map(declared, [*SCRIPTS.values(), *scripts_of_pages()]))
    unknown = []
    for span in spans(page):
        span = span.replace("'", '"') if span.count("'") % 2 else span
        of_scripts = [*commands(span)] if "--" in span else []
        if of_scripts:
            for script, words in of_scripts:
                given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
                known = declared(script) if script not in user_files() else given
                unknown += [f"{script} --{name}" for name in given - known]
        elif not re.match(r"accelerate|torchrun|pip", span):
            unknown += [name for name in re.findall(r"(?<![\w-])--([\w-]*\w)", span) if name not in every]
    assert unknown == []


# ------------------------------------------------------------------------------------------------------------- Python

BLOCKS = [
    pytest.param(text, id=f"{in_project(page)}-{number}")
    for page in PAGES
    for number, text in enumerate(blocks(page, "python"))
]


def save(text, folder):
    """Write a block to the file that its first line names, or else to block.py."""
    named = re.match(r"# (\w+\.py)\n", text)
    path = folder / (named[1] if named else "block.py")
    path.write_text(text)
    return path


def page_file(page, name, folder):
    """The block of a page that is the file `name`, written to a folder."""
    text = next(text for text in blocks(ROOT / "docs" / page, "python") if text.startswith(f"# {name}\n"))
    return save(text, folder)


@pytest.fixture
def workplace(tmp_path, world, monkeypatch):
    """The current folder, with all that blocks expect to find: a result, the tiny world, pictures with captions."""
    (tmp_path / "outputs").mkdir()
    for name in ("run", "rlhf"):
        (tmp_path / "outputs" / name).symlink_to(world.model)
    (tmp_path / "tiny_world").symlink_to(ROOT / "tiny_world")
    pictures, rng = tmp_path / "my_images", np.random.default_rng(0)
    pictures.mkdir()
    for number, caption in enumerate(shapes.training_captions()[:3]):
        shapes.draw(caption, rng).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"{caption}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", BLOCKS)
def test_python_blocks_run(text, workplace):
    """Each block by itself; a reward that it defines judges two images."""
    path = save(text, workplace)
    made = runpy.run_path(str(path), run_name="block")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name, value in made.items():
        if getattr(value, "__module__", "") != "block":
            continue
        is_reward = inspect.isfunction(value) and [*inspect.signature(value).parameters] == ["images", "prompts"]
        if is_reward or hasattr(value, "get_reward"):
            scores = load_reward(f"{path}:{name}").get_reward(images, ["a red circle", "a blue square"])
            assert scores.shape == (2,) and scores.isfinite().all()


def test_reward_of_a_file_scores_images_by_the_command(workplace):
    """The commands of rewards.md and extending.md, on pictures of the tiny world."""
    page_file("rewards.md", "my_reward.py", workplace), page_file("extending.md", "sharp_and_bright.py", workplace)
    (workplace / "prompts.txt").write_text("a picture\n")
    spec = "./my_reward.py:redness,./sharp_and_bright.py:SharpAndBright:2"
    command = ["--reward_model", spec, "--images", "my_images", "--prompts", "prompts.txt", "--output", "scores.json"]
    assert importlib.import_module("reward").cli(command) == 0
    rows = json.loads((workplace / "scores.json").read_text())
    assert len(rows) == 3
    for row, number in zip(rows, range(3), strict=True):
        pixels = torch.tensor(np.asarray(Image.open(workplace / "my_images" / f"{number}.png"))) / 255
        red, green, blue = pixels.mean((0, 1)).tolist()
        assert row["redness"] == pytest.approx(red - (green + blue) / 2, abs=1e-5)
        sharp = row["SharpAndBright/edges"] - abs(row["SharpAndBright/brightness"] - 0.5)
        assert row["SharpAndBright"] == pytest.approx(sharp, abs=1e-6)
        assert row["reward"] == pytest.approx(row["redness"] + 2 * row["SharpAndBright"], abs=1e-5)


def test_reward_that_waits_leaves_out_what_failed(workplace):
    path = page_file("extending.md", "remote.py", workplace)
    scores = load_reward(f"{path}:Remote", failure="skip").get_reward(torch.full((2, 3, 8, 8), 0.25), ["", "a cat"])
    assert scores[0].isnan() and scores[1] == 0.25


def test_grading_scheme_of_the_page_grades(workplace, server):
    (text,) = [text for text in blocks(ROOT / "docs" / "extending.md", "text") if text.startswith("aspects:")]
    (workplace / "poster.txt").write_text(text)
    aspects = {name: {"justification": "seen", "score": score} for name, score in (("legibility", 4), ("layout", 8))}
    server.default = Action(json.dumps({**aspects, "overall": 1}))
    options = {"base_url": server.base_url, "api_key": "none", "cache_dir": str(workplace / "cache")}
    reward = load_reward("mllm", mllm_template="./poster.txt", mllm_score="mean", **options)
    total, parts = reward.score(torch.rand(1, 3, 32, 32), ["a poster"])
    assert total.item() == pytest.approx(0.6) and parts["mllm/layout"].item() == pytest.approx(0.8)
    told = server.requests[-1]["body"]["messages"][0]["content"]
    assert "Do text and picture leave each other room?" in told


def test_reward_of_the_page_trains(workplace, train, flags):
    path = page_file("extending.md", "sharp_and_bright.py", workplace)
    assert train(flags(reward_model=f"{path}:SharpAndBright", max_train_steps=1)) == 0
    (line,) = metrics(workplace / "run")
    assert line["reward/spread"] > 0 and "reward/component/SharpAndBright/edges" in line


def test_data_of_the_page_are_trained_on(workplace, train, flags, capsys):
    runpy.run_path(str(page_file("extending.md", "convert.py", workplace)))
    assert train(flags(train_data_dir=None, dataset_name="my_data", max_train_steps=1)) == 0
    assert "3 rows of my_data" in capsys.readouterr().out and len(metrics(workplace / "run")) == 1


@pytest.mark.slow
def test_baseline_of_the_page_trains_and_resumes(workplace, world, monkeypatch):
    """By the page's own command, with fewer steps and rows; two steps equal one step and a resumed one."""
    path = page_file("extending.md", "rwr.py", workplace)
    texts = blocks(ROOT / "docs" / "extending.md", "bash")
    (words,) = [words for text in texts for script, words in commands(text) if script == "rwr.py"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (workplace / "prompts.txt").write_text("\n".join(shapes.training_captions()[:4]) + "\n")
    quick = ["--infer_steps=3", "--train_batch_size=2", "--seed=0", f"--cache_dir={world.cache}", "--train_rows=3"]

    def run(output, *more):
        command = [sys.executable, str(path), *words, *quick, f"--output_dir={workplace / output}", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr

    run("whole", "--max_train_steps=2")
    run("parts", "--max_train_steps=1", "--checkpointing_steps=1")
    run("parts", "--max_train_steps=2", "--resume_from_checkpoint=latest")
    whole, parts = metrics(workplace / "whole"), metrics(workplace / "parts")
    assert [line["grad_norm"] for line in whole] == [line["grad_norm"] for line in parts]
    assert whole[0]["grad_norm"] > 0 and (workplace / "whole" / "model_index.json").exists()
    weights = runpy.run_path(str(path), run_name="block")["rwr_weights"]
    given = weights(torch.tensor([[0.0, 1.0, torch.nan], [torch.nan] * 3]), 0.5)
    torch.testing.assert_close(given, torch.tensor([[1 / (1 + np.e**2), 1 / (1 + np.e**-2), 0.0], [0.0] * 3]))


# ------------------------------------------------------------------------------------------------------------- memory


def memory_table():
    """The rows of the table of scale.md: run, flags, and GiB as text, by column."""
    text = (ROOT / "docs" / "scale.md").read_text()
    rows = re.findall(r"^\| (SFT|RLHF) \|(.*)\|(.*)\|(.*)\|(.*)\|(.*)\|$", text, re.MULTILINE)
    return [(method, words.strip(" `").split(), [cell.strip() for cell in cells]) for method, words, *cells in rows]


def test_memory_table_is_what_the_dry_run_says(workplace, world, capsys):
    (shape,) = [text for text in blocks(ROOT / "docs" / "scale.md", "python") if "sdxl_shape" in text]
    runpy.run_path(str(save(shape, workplace)))
    (workplace / "prompts.txt").write_text("a cat\n")
    data = {"SFT": f"--train_data_dir={world.shapes}", "RLHF": "--prompts_file=prompts.txt"}
    count = launching.count_unet_parameters(Source("pretrained_model_name_or_path", "outputs/sdxl_shape"))
    assert len(memory_table()) == 11
    for method, words, (alone, *parts) in memory_table():
        script = importlib.import_module(SCRIPTS[method].removesuffix(".py"))
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        model = ["--pretrained_model_name_or_path=outputs/sdxl_shape", "--mixed_precision=bf16", "--report_to=none"]
        assert script.cli([*model, data[method], f"--cache_dir={world.cache}", "--dry_run", *words]) == 0
        held = re.search(r"memory held  ([\d.]+) GiB", capsys.readouterr().out)[1]
        assert f"{float(held):.1f}" == alone
        for number, cell in zip((2, 4, 8), parts, strict=True):
            if cell:
                said = launching.memory_held(count, True, False, "--use_ema" in words, method == "RLHF", number)
                assert f"{float(said.split()[0]):.1f}" == cell
