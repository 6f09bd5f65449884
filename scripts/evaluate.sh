#!/usr/bin/env bash
# Compare models on the same prompts and noise: environment, then scripts/evaluate.py with the flags given here.
#
#   bash scripts/evaluate.sh --models base=MODEL tuned=outputs/run --prompts prompts.txt --reward_model clip --output_dir outputs/evaluation
set -euo pipefail
source "$(dirname "$0")/environment.sh"
install requirements.txt
exec "$VENV/bin/python" scripts/evaluate.py "$@"
