#!/usr/bin/env bash
# Sets up .venv and runs the tests. Fast tier by default (no real model, a few minutes); --all runs everything.
# Further arguments go to pytest. What is skipped is printed with its reason.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
all=
if [ "${1:-}" = "--all" ]; then all=1; shift; fi
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
run() { .venv/bin/python -m pytest "$@" || [ $? = 5 ]; }  # 5: these files have no test of this tier
# Tiny models run in one thread, so every core takes files of its own; a file's tests share what they made.
run -m "not slow and not gpu" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
# Real models and launches of several processes need the machine to themselves.
if [ -n "$all" ]; then run -m "slow or gpu" "$@"; fi
