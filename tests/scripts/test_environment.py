"""scripts/environment.sh: which Python it takes and what it installs when, with interpreters that only answer."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.support.runs import ROOT

# Answers the question for its version, makes an environment with a copy of itself, and notes what pip was to install.
FAKE = """#!{bash}
case "$*" in
  -c*) echo {version} ;;
  "-m venv "*)
    echo "$*" >> "{log}"
    folder="${{@: -1}}"
    [[ $* != *--clear* ]] || rm -r "$folder"
    mkdir -p "$folder/bin" && touch "$folder/pyvenv.cfg" && cp "$0" "$folder/bin/python" ;;
  "-m pip "*) echo "$*" >> "{log}"; exit {pip_status} ;;
  *) exit 1 ;;
esac
"""
COMMANDS = ("bash", "cat", "cp", "dirname", "ls", "mkdir", "rm", "touch")


@pytest.fixture
def bin_folder(tmp_path):
    """The only folder on PATH: the commands that the script may use, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).symlink_to(shutil.which(name))
    return folder


@pytest.fixture
def fake(bin_folder, tmp_path):
    def write(name, version, pip_status=0):
        path = bin_folder / name
        log = tmp_path / "log"
        path.write_text(FAKE.format(bash=bin_folder / "bash", version=version, log=log, pip_status=pip_status))
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture
def project(tmp_path):
    """A copy of what an environment is made from."""
    folder = tmp_path / "project"
    for name in ("scripts/environment.sh", "pyproject.toml", "requirements.txt", "tests/requirements.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "sharpening").mkdir()
    (folder / "sharpening" / "__init__.py").touch()
    return folder


@pytest.fixture
def source(project, bin_folder):
    """Source the script as the others do, then run a command; the result of the whole."""

    def run(command='echo "$PYTHON"', **environment):
        return subprocess.run(
            ["bash", "-c", f'set -euo pipefail; source "{project}/scripts/environment.sh"; {command}'],
            env={"PATH": str(bin_folder), **environment}, capture_output=True, text=True,
        )  # fmt: skip

    return run


@pytest.fixture
def installed(source, tmp_path):
    """Install as test.sh does; what was asked of Python and pip, a line each."""

    def run(files="requirements.txt tests/requirements.txt", status=0, **environment):
        log = tmp_path / "log"
        log.write_text("")
        result = source(f"install {files}", **environment)
        assert result.returncode == status, result.stderr
        return log.read_text().splitlines()

    return run


def assert_refused(result, *words):
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]*PYTHON=/path/to/python3\.\d+\n", result.stderr)
    for word in words:
        assert word in result.stderr


def wanted(version):
    """Whether pyproject.toml takes this version."""
    return version in SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])


@pytest.mark.parametrize("version", ["2.7", "3.1", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.111"])
def test_versions_taken_are_those_of_the_project(version, source, fake):
    python = fake("some-python", version)
    result = source(PYTHON=python)
    assert wanted(version) == (version in ("3.11", "3.12", "3.13"))
    if wanted(version):
        assert (result.returncode, result.stdout, result.stderr) == (0, f"{python}\n", "")
    else:
        assert_refused(result, f"PYTHON={python} is Python {version},", "3.11 to 3.13")


def real_interpreters():
    """This one and those of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return [sys.executable, *map(str, sorted(pyenv.glob("versions/*/bin/python")))]


@pytest.mark.parametrize("python", real_interpreters())
def test_real_interpreters_answer(python, source):
    answer = subprocess.run([python, "-V"], capture_output=True, text=True)
    version = re.match(r"Python (\d+\.\d+)", answer.stdout + answer.stderr)[1]
    result = source(PYTHON=python)
    if wanted(version):
        assert (result.returncode, result.stdout) == (0, f"{python}\n"), result.stderr
    else:
        assert_refused(result, f"is Python {version},")


def test_unnamed_python_is_the_first_that_suits(source, fake):
    assert_refused(source(), "no Python from 3.11 to 3.13 was found")
    fake("python3", "3.10")
    assert_refused(source(), "no Python from 3.11 to 3.13 was found")
    fake("python", "3.12")
    assert source().stdout == "python\n"
    fake("python3.13", "$(exit 127)")  # pyenv leaves such names for versions that are not switched on
    assert source().stdout == "python\n"
    fake("python3.13", "3.13")
    assert source().stdout == "python3.13\n"


def test_a_named_python_that_is_missing_is_refused_whatever_else_is_there(source, fake):
    fake("python3.11", "3.11")
    assert_refused(source(PYTHON="python3.12"), "PYTHON=python3.12 was not found or does not run")


def test_project_and_requirements_are_installed_once(installed, fake):
    fake("python3.12", "3.12")
    venv, pip = installed()
    assert venv == "-m venv .venv"
    assert "-r requirements.txt -r tests/requirements.txt --editable ." in pip
    assert installed() == []
    assert installed("requirements.txt") == []


def test_what_changed_is_installed_again(installed, fake, project):
    fake("python3.12", "3.12")
    installed()
    for name in ("requirements.txt", "tests/requirements.txt"):
        with (project / name).open("a") as file:
            file.write("another==1.0\n")
        (pip,) = installed()
        assert f"-r {name} --editable ." in pip and pip.count("-r ") == 1
    with (project / "pyproject.toml").open("a") as file:
        file.write("# another line\n")
    assert len(installed()) == 1
    # An editable install names the packages that there were.
    (project / "another").mkdir()
    (project / "another" / "__init__.py").touch()
    assert len(installed()) == 1
    assert installed() == []


def test_a_failed_install_is_tried_again(installed, fake, project):
    fake("python3.12", "3.12", pip_status=1)
    assert len(installed(status=1)) == 2
    shutil.copy(fake("python3.12", "3.12"), project / ".venv" / "bin" / "python")
    assert len(installed()) == 1
    assert installed() == []


def test_another_python_makes_the_environment_anew(installed, fake):
    fake("python3.12", "3.12")
    newer = fake("python3.13", "3.13")
    installed()
    venv, pip = installed("requirements.txt", PYTHON=newer)
    assert venv == "-m venv --clear .venv"
    assert "-r requirements.txt --editable ." in pip
    assert len(installed()) == 1  # the tests' requirements; the environment's own Python goes before python3.12
    assert installed(PYTHON=newer) == []


def test_a_folder_that_is_no_environment_is_left_alone(source, fake, tmp_path):
    fake("python3.12", "3.12")
    folder = tmp_path / "photographs"
    folder.mkdir()
    (folder / "one.png").touch()
    result = source("install requirements.txt", VENV=str(folder))
    assert result.returncode == 2
    assert result.stderr == (
        f"error: VENV={folder} is not empty and holds no environment; name another folder with VENV=/path/to/folder\n"
    )
    assert [path.name for path in folder.iterdir()] == ["one.png"]
