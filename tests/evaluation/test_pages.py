"""Templates of pages: they are installed with the package, and what is filled in stays text."""

import tomllib
from fnmatch import fnmatch

import pytest

from sharpening.evaluation import pages
from tests.support.runs import ROOT


def test_templates_are_files_of_the_package():
    """`pip install .` takes Python files alone, and these."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [file.relative_to(pages.TEMPLATES.parent).as_posix() for file in pages.TEMPLATES.iterdir()]
    globs = setuptools["package-data"]["sharpening.evaluation"]
    assert files and all(any(fnmatch(file, glob) for glob in globs) for file in files)


def test_number_that_json_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        pages.write_page(tmp_path / "vote.html", "vote.html.jinja", data={"study": float("nan")})
    assert list(tmp_path.iterdir()) == []
