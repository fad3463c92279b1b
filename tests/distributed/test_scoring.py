"""Two launched processes score each other's missing shards: the folder is the one that a single process writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prunetune.data.scoring import score
from prunetune.data.store import read_scores
from tests.data.test_scoring import rows
from tests.distributed.test_two_processes import DDP, LIMIT_S, ROOT, free_port
from tests.support import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow  # starting two processes of torch takes longer than what they do


def test_two_processes_score_what_one_does(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(600)))
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DDP), "--num_processes", "2"),
        *("--main_process_port", str(free_port()), "--module", "prunetune", "data", "score"),
        *(str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "scores")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    found = read_scores(tmp_path / "scores")
    alone = score([{**row, "prompt": row["prompt"] + "\n"} for row in rows(600)], model, tokenizer)
    assert list(found.table.ids) == list(alone.table.ids)
    for name in ("nll", "entropy", "el2n"):
        np.testing.assert_allclose(found.table.tokens[name], alone.table.tokens[name], atol=2e-5)
