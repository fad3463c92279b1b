#!/usr/bin/env bash
# Sets up .venv and runs the tests. Fast tier by default (no real model, a few minutes); --all runs everything.
# Further arguments go to pytest. What is skipped is printed with its reason.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
tier=(-m "not slow and not gpu")
if [ "${1:-}" = "--all" ]; then tier=(); shift; fi
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "${tier[@]}" "$@"
