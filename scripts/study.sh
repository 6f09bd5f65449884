#!/usr/bin/env bash
# The paper's tables and figures in miniature: environment, then `python -m study` with the flags given here.
#
#   bash scripts/study.sh            # some hours on 2 cores (docs/study.md); --quick: minutes; the same command resumes
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" -m study "$@"
