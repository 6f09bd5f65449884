"""`report.html` in Chromium: what it shows, sorts and filters, and how fast it opens."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from scripts.evaluate import main
from sharpening.evaluation.comparison import compare_with_first
from sharpening.evaluation.html_report import write_html
from tests.support.evaluation import PROMPTS

ATTACK = "<script>window.broken = 1</script> & \"a red circle\" </script> <img src=x onerror='window.broken = 2'>"
LOADED = "Promise.all([...document.images].slice(0, 6).map((image) => image.decode()))"
FRAMES = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
METRICS = ("brightness", "jpeg_compressibility")  # as the page calls them; the first is of a file


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    """An evaluation of 30 images of three prompts by two models: its page, its summary, and its scores by column."""
    out = tmp_path_factory.mktemp("report")
    (out / "prompts.txt").write_text(f"{PROMPTS[0]}\n{PROMPTS[1]}\n{ATTACK}\n")
    (out / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    reward = f"{out}/mine.py:brightness"
    models = [f"base={folder}/model0", f"other={folder}/model1"]
    flags = {"prompts": out / "prompts.txt", "output_dir": out / "out", "reward_model": reward, "batch_size": 30}
    flags |= {"num_images": 30, "num_inference_steps": 1, "guidance_scale": 1, "metrics": METRICS[1], "grid_images": 1}
    assert main(["--models", *models, *(f"--{name}={value}" for name, value in flags.items())]) == 0
    with (out / "out" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if "/" in name}
    columns = {name.replace(reward, METRICS[0]): column for name, column in columns.items()}
    summary = json.loads((out / "out" / "summary.json").read_text())
    summary["metrics"][METRICS[0]] = summary["metrics"].pop(reward)
    return SimpleNamespace(page=out / "out" / "report.html", summary=summary, columns=columns)


@pytest.fixture
def tab(visit, evaluated):
    tab = visit(evaluated.page)
    yield tab
    assert tab.errors == tab.requests == []
    assert tab.page.evaluate("window.broken") is None
    tab.page.context.close()


def drawn(path, scores, size=4, noise=False, **changes):
    """A page of made-up scores, metric -> model -> (N,); each image is one colour, or noise that does not compress."""
    names, count = list(next(iter(scores.values()))), len(next(iter(next(iter(scores.values())).values())))
    rng = np.random.default_rng(0)
    images = {name: [path.parent / "images" / name / f"{index} #.png" for index in range(count)] for name in names}
    for files in images.values():
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for file in files:
            values = rng.integers(256, size=(size, size, 3) if noise else (1, 1, 3), dtype=np.uint8)
            Image.fromarray(np.broadcast_to(values, (size, size, 3))).save(file, compress_level=0 if noise else 6)
    settings = {"reward_model": next(iter(scores)), "seed": 7, "guidance_scale": 1.0, "num_inference_steps": 25}
    models = {name: {"path": name, "search": None, "nfe": 25.0, "seconds": float("nan")} for name in names}
    scores = {metric: {name: np.asarray(v, float) for name, v in of.items()} for metric, of in scores.items()}
    arguments = {
        "settings": settings, "models": models, "scores": scores, "images": images,
        "results": {metric: compare_with_first(of_models) for metric, of_models in scores.items()},
        "prompts": [f"prompt {index % 9}" for index in range(count)], "labels": {metric: metric for metric in scores},
    }  # fmt: skip
    write_html(path, **arguments | changes)
    return path


def order(page):
    """The images of the gallery from its first row to its last, all rows made."""
    while page.locator("#more").is_visible():
        page.locator("#more").scroll_into_view_if_needed()
        page.wait_for_timeout(50)
    return [int(row.get_attribute("data-image")) for row in page.locator("#rows > li").all()]


def test_numbers_are_those_of_the_summary_and_prompts_are_text(tab, evaluated):
    results = tab.page.inner_text("#results").replace("\N{MINUS SIGN}", "-")
    for metric in METRICS:
        other = evaluated.summary["metrics"][metric]["other"]
        low, high = (other["gain"] + sign * 1.96 * other["gain_standard_error"] for sign in (-1, 1))
        assert f"{other['mean']:.4f} ± {other['standard_error']:.4f}" in results
        assert f"{other['gain']:+.4f}" in results and f"[{low:+.4f}, {high:+.4f}]" in results
        assert f"[{other['win_low']:.3f}, {other['win_high']:.3f}]" in results
    assert f"{evaluated.summary['models']['other']['seconds']:.3g}" in tab.page.inner_text("#cost")
    assert ATTACK in tab.page.inner_text("#by-prompt") and ATTACK in tab.page.inner_text("#rows")


def test_worst_first_is_one_click(tab, evaluated):
    assert tab.page.locator("#rows > li").count() < 30  # the rest is made when it is scrolled to
    assert order(tab.page) == list(range(30))
    gains = evaluated.columns["other/brightness"] - evaluated.columns["base/brightness"]
    tab.page.click("text=Worst first")
    shown = gains[order(tab.page)]
    assert len(shown) == 30 and (np.diff(shown) >= -1e-4).all()
    tab.page.click("text=Best first")
    assert (np.diff(gains[order(tab.page)]) <= 1e-4).all()


def test_gallery_is_sorted_by_any_reward_of_any_model(tab, evaluated):
    tab.page.select_option("#sort", label="base: jpeg_compressibility")
    assert (np.diff(evaluated.columns["base/jpeg_compressibility"][order(tab.page)]) >= -1e-4).all()
    assert tab.page.get_attribute("[data-order=worst]", "aria-pressed") == "true"


def test_gallery_is_filtered_by_words_of_the_prompt(tab):
    tab.page.fill("#filter", "BLUE  square")
    tab.page.locator("#count:has-text('10 of 30')").wait_for()
    assert order(tab.page) == list(range(1, 30, 3))
    assert {row.inner_text().split(" image")[0] for row in tab.page.locator("#rows > li > p").all()} == {PROMPTS[1]}


def test_gains_by_prompt_lead_to_their_images(tab, evaluated):
    tab.page.select_option("#by-prompt-metric", label="jpeg_compressibility")
    column = [evaluated.columns[f"{model}/jpeg_compressibility"] for model in ("other", "base")]
    gains = sorted((column[0] - column[1])[first::3].mean() for first in range(3))
    cells = tab.page.locator("#by-prompt-table tbody td:nth-child(3)").all()
    assert [float(cell.inner_text().replace("\N{MINUS SIGN}", "-")) for cell in cells] == pytest.approx(
        gains, abs=0.01
    )
    tab.page.click("#by-prompt-table thead button")
    assert tab.page.get_attribute("#by-prompt-table th:nth-child(3)", "aria-sort") == "descending"
    tab.page.click(f"#by-prompt-table button:has-text('{PROMPTS[0]}')")
    assert order(tab.page) == list(range(0, 30, 3))


def test_keyboard_is_enough(tab):
    tab.page.focus("#sort")
    tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("Enter")
    assert tab.page.get_attribute("[data-order=worst]", "aria-pressed") == "true"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_page_fits_its_window_and_every_image_has_a_text(visit, evaluated, width, dark):
    page = visit(evaluated.page, width=width, dark=dark).page
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert all(image.get_attribute("alt") for image in page.locator("img").all())
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(", "))) < 380) == dark
    page.context.close()


def test_scatter_shows_points_that_can_be_hidden_and_asked(tab):
    canvas = tab.page.locator("canvas")
    picture = "() => document.querySelector('canvas').toDataURL()"
    tab.page.evaluate(FRAMES)
    assert tab.page.evaluate("document.querySelector('canvas').width") > 400
    both = tab.page.evaluate(picture)
    tab.page.uncheck("#legend input >> nth=1")
    assert tab.page.evaluate(picture) != both
    tab.page.check("#legend input >> nth=1")
    assert tab.page.evaluate(picture) == both
    assert "brightness against jpeg_compressibility" in canvas.get_attribute("aria-label")
    # With the gray base hidden, the topmost coloured pixel is of a point.
    find = """canvas => {
      const pen = canvas.getContext('2d'), { width, height } = canvas, ratio = width / canvas.clientWidth;
      for (let y = 0; y < height; y++) for (let x = 64 * ratio; x < width; x++) {
        const [r, g, b] = pen.getImageData(x, y, 1, 1).data;
        if (Math.max(r, g, b) - Math.min(r, g, b) > 40) return { x: x / ratio, y: y / ratio };
      }
    }"""
    tab.page.uncheck("#legend input >> nth=0")
    place = canvas.evaluate(find)
    canvas.hover(position=place)
    assert tab.page.inner_text("#tip").startswith("other: ") and tab.page.locator("#tip img").count() == 1


@pytest.mark.parametrize(("change", "words"), [(-1, "right and down: this reward was lost"), (1, "right and up")])
def test_reward_that_was_gamed_is_said(change, words, visit, tmp_path):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(2, 40))
    moved = base + np.array([[1], [change]]) + rng.normal(size=(2, 40)) / 10
    scores = {name: {"base": base[row], "tuned": moved[row]} for row, name in enumerate(("trained", "other"))}
    tab = visit(drawn(tmp_path / "report.html", scores))
    assert words in tab.page.inner_text("#gaming figcaption") and tab.errors == []
    tab.page.context.close()


def test_images_without_a_score_come_last_whichever_way(visit, tmp_path):
    scores = {"mine": {"base": [0, 0, 0, np.nan], "tuned": [1, np.nan, -1, 5]}}
    page = visit(drawn(tmp_path / "report.html", scores)).page
    page.click("text=Worst first")
    assert order(page)[:2] == [2, 0]
    page.click("text=Best first")
    assert order(page)[:2] == [0, 2]
    assert "unknown" in page.inner_text("#cost") and page.locator("#gaming").count() == 0
    page.context.close()


def test_base_alone_has_a_page(visit, tmp_path):
    tab = visit(drawn(tmp_path / "report.html", {"mine": {"base": [1, 2]}, "other": {"base": [2, 1]}}))
    assert order(tab.page) == [0, 1] and tab.errors == [] and tab.page.locator("#by-prompt").count() == 0
    tab.page.context.close()


def test_small_images_are_in_the_page_and_large_ones_beside_it(visit, tmp_path):
    scores = {"mine": {"base": [0, 1], "tuned": [1, 0]}}
    small = drawn(tmp_path / "small" / "report.html", scores)
    small = small.rename(tmp_path / "moved.html")
    large = drawn(tmp_path / "large" / "report.html", scores, size=1200, noise=True)  # 4 MB each
    assert large.stat().st_size < 100_000
    for path, width in ((small, 4), (large, 1200)):
        tab = visit(path)
        widths = tab.page.evaluate(f"{LOADED}.then(() => [...document.images].map((image) => image.naturalWidth))")
        assert widths == [width] * 4 and tab.errors == tab.requests == []
        tab.page.context.close()


def test_opens_within_two_seconds_at_400_images_of_3_models(visit, tmp_path):
    rng = np.random.default_rng(0)
    scores = {metric: {name: rng.random(400) for name in ("base", "a", "b")} for metric in ("mine", "x", "y")}
    path = drawn(tmp_path / "report.html", scores, size=32, noise=True)
    assert path.stat().st_size > 4_000_000
    seconds = []
    for _ in range(3):  # other processes of the tests take the processor now and then
        tab = visit(path)
        # From the start of the navigation to the second frame after the first images are there.
        tab.page.evaluate(f"{LOADED}.then(() => {FRAMES})")
        seconds.append(tab.page.evaluate("performance.now()") / 1000)
        tab.page.context.close()
    assert min(seconds) < 2
