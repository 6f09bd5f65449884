# Sourced by the other scripts, which call `install requirements.txt`: makes an environment with the project in it, or
# brings it up to date, and does nothing when it is up to date.
#
# PYTHON names the interpreter, 3.11 to 3.13 (default: the environment's own, else the first that is found);
# VENV names the environment's folder (default: .venv).
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-.venv}

# python_version PYTHON: its version, as 3.12; nothing when it is not there or does not run.
python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

# suits VERSION: whether the requirements have wheels for it; pyproject.toml names the same range.
suits() { case $1 in 3.11 | 3.12 | 3.13) ;; *) return 1 ;; esac }

# choose_python: set PYTHON and PYTHON_VERSION, or end with the reason why there is none.
choose_python() {
  local named=${PYTHON:-} candidates=("$VENV/bin/python" python3.11 python3.12 python3.13 python3 python)
  [ -z "$named" ] || candidates=("$named")
  for PYTHON in "${candidates[@]}"; do
    PYTHON_VERSION=$(python_version "$PYTHON")
    suits "$PYTHON_VERSION" && return
  done
  local remedy="with PYTHON=/path/to/python3.12"
  if [ -z "$named" ]; then
    echo "error: no Python from 3.11 to 3.13 was found; install one, or name it $remedy" >&2
  elif [ -n "$PYTHON_VERSION" ]; then
    echo "error: PYTHON=$named is Python $PYTHON_VERSION, but 3.11 to 3.13 is needed; name one $remedy" >&2
  else
    echo "error: PYTHON=$named was not found or does not run; name a Python from 3.11 to 3.13 $remedy" >&2
  fi
  exit 2
}

# create_environment: an empty one, in place of one of another version of Python.
create_environment() {
  local clear=
  if [ -e "$VENV/pyvenv.cfg" ]; then
    clear=--clear
  elif [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
    echo "error: VENV=$VENV is not empty and holds no environment; name another folder with VENV=/path/to/folder" >&2
    exit 2
  fi
  # Of one that was left half made, nothing must look whole the next time.
  "$PYTHON" -m venv $clear "$VENV" || { rm -f "$VENV/bin/python" && exit 1; }
}

# stamp FILE: what an environment with this file's requirements is made from. An editable install names this folder and
# the packages in it.
stamp() {
  echo "Python $PYTHON_VERSION, $PWD:" *.py */__init__.py
  cat pyproject.toml "$1"
}

# marker FILE: where the environment keeps the stamp of a file that it was made from.
marker() { echo "$VENV/.installed-${1//\//-}"; }

install() {
  local file outdated=()
  [ "$(python_version "$VENV/bin/python")" = "$PYTHON_VERSION" ] || create_environment
  for file in "$@"; do
    [ "$(stamp "$file")" = "$(cat "$(marker "$file")" 2>/dev/null)" ] || outdated+=(-r "$file")
  done
  [ ${#outdated[@]} -gt 0 ] || return 0
  echo "setting up $VENV with Python $PYTHON_VERSION (the first time a few minutes and about 8 GB)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${outdated[@]}" --editable .
  for file in "$@"; do stamp "$file" >"$(marker "$file")"; done
}

choose_python
