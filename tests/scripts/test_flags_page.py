"""`docs/flags.md` is what the declarations say."""

from importlib import import_module
from pathlib import Path

from scripts.flags_page import PAGE, SCRIPTS, page
from sharpening.flags import every_flag
from tests.support.runs import SCRIPTS as EVERY_SCRIPT


def test_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run python scripts/flags_page.py"


def test_page_has_every_flag_of_every_script():
    assert {name.replace(".", "/") + ".py" for name in SCRIPTS} == set(EVERY_SCRIPT.values())
    text = Path(PAGE).read_text()
    for name in SCRIPTS:
        for flag in every_flag(import_module(name).FLAGS):
            assert f"`--{flag}`" in text
