"""Scores made by hand, of rows of the tiny tokenizer: what tests of selections start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from prunetune.data.store import StoredScores
from prunetune.model.score_table import ScoreTable
from tests.support import tiny_tokenizer

PROMPT = 4


def stored(rows: int = 24, seed: int = 0, tokenizer: Path | None = None, **changes: Any) -> StoredScores:
    """Scores of ``rows`` rows: four prompt tokens, then 3 to 14 target tokens that end with </s>.

    Row ids are sorted; every third row is of source ``rare``, the others of ``common``.
    """
    rng = np.random.default_rng(seed)
    ids = sorted(f"{value:08x}" for value in rng.choice(2**31, rows, replace=False))
    counts = rng.integers(3, 15, rows)
    input_ids = [[*rng.integers(5, 90, PROMPT + n - 1).tolist(), 2] for n in counts]
    labels = [[-100] * PROMPT + list(row[PROMPT:]) for row in input_ids]
    total = int(counts.sum())
    last = np.cumsum(counts) - 1
    tokens = {
        "token": np.concatenate([row[PROMPT:] for row in input_ids]).astype(np.int32),
        "position": np.concatenate([PROMPT + np.arange(n) for n in counts]).astype(np.int32),
        "nll": rng.exponential(1.5, total).astype(np.float32),
        "entropy": rng.exponential(1.0, total).astype(np.float32),
        "top1": rng.random(total) < 0.5,
        "el2n": rng.random(total).astype(np.float32),
        "protected": np.isin(np.arange(total), last),
        "paragraph": np.concatenate([np.arange(n) // 3 for n in counts]).astype(np.int32),
    }
    columns = {
        "length": np.array([len(row) for row in input_ids], dtype=np.int64),
        "source": np.array(["rare" if i % 3 == 0 else "common" for i in range(rows)], dtype=object),
        "prompt": np.array(["" for _ in range(rows)], dtype=object),
        "answer": np.array(["" for _ in range(rows)], dtype=object),
    }
    table = ScoreTable(ids, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), columns, tokens)
    header = {
        "tokenizer": str(tokenizer) if tokenizer else None,
        "tokenizer_hash": "t",
        "template_hash": "c",
        "max_length": 64,
        "targets": {"completion_only": None, "assistant_only": False},
        "model": "tiny",
        "model_hash": "m",
        "seconds": 12.5,
        "scored_tokens": sum(map(len, input_ids)),
        **changes,
    }
    decode = tiny_tokenizer().decode
    examples = [{"prompt": decode(row[:PROMPT]), "completion": decode(row[PROMPT:-1])} for row in input_ids]
    return StoredScores(table, examples, input_ids, labels, header)


def tokenizer_folder(path: Path) -> Path:
    """A folder with the tiny tokenizer."""
    tiny_tokenizer().save_pretrained(path)
    return path
