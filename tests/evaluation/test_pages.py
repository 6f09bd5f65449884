"""Templates of pages: they are installed with the package, and what is filled in stays text."""

import tomllib
from fnmatch import fnmatch

import pytest

from sharpening import pages
from sharpening.evaluation import blind_study
from tests.support.runs import ROOT


@pytest.mark.parametrize("package", ["evaluation", "running"])
def test_templates_are_files_of_the_package(package):
    """`pip install .` takes Python files alone, and these."""
    folder = ROOT / "sharpening" / package
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [file.relative_to(folder).as_posix() for file in (folder / "templates").iterdir()]
    globs = setuptools["package-data"][f"sharpening.{package}"]
    assert files and all(any(fnmatch(file, glob) for glob in globs) for file in files)


def test_number_that_json_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        pages.write_page(tmp_path / "vote.html", blind_study.TEMPLATE, data={"study": float("nan")})
    assert list(tmp_path.iterdir()) == []
