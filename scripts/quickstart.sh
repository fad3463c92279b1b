#!/usr/bin/env bash
# From nothing to a fine-tuned, smaller, verified model and a before/after table, in one command.
# Arguments go to `prunetune train`, for example: bash scripts/quickstart.sh target.kept=80%
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
again=()
if [ -e runs/quickstart/resolved.yaml ]; then
    # Stopped on the way: go on. Finished: start anew.
    if [ -e runs/quickstart/report.html ]; then again=(--overwrite); else again=(--resume); fi
fi
.venv/bin/prunetune plan configs/quickstart.yaml "$@"
.venv/bin/prunetune train configs/quickstart.yaml "${again[@]}" "$@"
