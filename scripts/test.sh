#!/usr/bin/env bash
# Lint, then the fast tests: 5 minutes on 2 cores after installation. --all runs every test: about half an hour.
# Further arguments go to pytest:
#
#   bash scripts/test.sh tests/rewards -k clip
#   bash scripts/test.sh --all -n 8             # as many processes as there are cores; the default is 2
#   bash scripts/test.sh -n 0 --pdb             # one process, which a debugger needs
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install requirements.txt tests/requirements.txt
source "$VENV/bin/activate"
# Two threads fighting over the cores of two processes are ten times slower than one each.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
which="not slow"
if [ "${1:-}" = --all ]; then
  which=""
  shift
fi
ruff check .
ruff format --check .
exec python -m pytest -n 2 --dist loadgroup -m "$which" "$@"
