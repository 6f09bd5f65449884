#!/usr/bin/env bash
# Lint and the whole test suite, environment included. Arguments go to pytest: scripts/test.sh -m "not slow"
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install requirements.txt tests/requirements.txt
source "$VENV/bin/activate"
# Two threads fighting over the cores of two processes are ten times slower than one each.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
exec python -m pytest "$@"
