# Sourced by the other scripts: creates .venv from requirements.txt on first use (or when the file changed) and enters it.
# PYTHON names the interpreter (default: python3.11), VENV another place for the environment.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV=${VENV:-.venv}
for candidate in "${PYTHON:-python3.11}" python3 python; do
  PYTHON=$(command -v "$candidate") && "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' && break
  PYTHON=
done
if [ -z "$PYTHON" ] && [ ! -x "$VENV/bin/python" ]; then
  echo "error: Python 3.11 was not found; install it, or name it with PYTHON=/path/to/python3.11" >&2
  exit 2
fi
# install FILE...: bring the environment to these requirements, or do nothing when it is there already.
install() {
  local stamp
  stamp=$(cat "$@" | sha256sum | cut -c1-16)
  local marker="$VENV/.installed-$stamp"
  [ -e "$marker" ] && return
  echo "setting up $VENV (a few minutes and about 8 GB, the first time only)"
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  local arguments=()
  for file in "$@"; do arguments+=(-r "$file"); done
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
  touch "$marker"
}
