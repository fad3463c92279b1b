"""Tables of statistics for the tests of sample methods: random ones, and the ones that something is wrong with."""

from __future__ import annotations

import hashlib

import numpy as np

from prunetune.model.score_table import ScoreTable

WORDS = [hashlib.sha256(str(number).encode()).hexdigest()[:6] for number in range(400)]


def row_ids(count: int, seed: int = 0) -> list[str]:
    return [hashlib.sha256(f"{seed}-{number}".encode()).hexdigest()[:16] for number in range(count)]


def random_table(count: int = 60, seed: int = 0, targets: list[int] | None = None, **columns: object) -> ScoreTable:
    """Every column filled at random; ``columns`` replace row or token columns, numbers fill them.

    Args:
        count: rows.
        seed: of the numbers and the ids.
        targets: target tokens of each row; None: 1 to 12.
    """
    draw = np.random.default_rng(seed)
    lengths = np.array(draw.integers(1, 13, count) if targets is None else targets, dtype=np.int64)
    total = int(lengths.sum())
    rows = {
        "length": lengths + 5,
        "source": np.array(draw.choice(["books", "code", "web"], count), dtype=object),
        "label": np.array(draw.choice(["easy", "hard"], count), dtype=object),
        "prompt": np.array([" ".join(draw.choice(WORDS, 12)) for _ in range(count)], dtype=object),
        "answer": np.array([" ".join(draw.choice(WORDS, 12)) for _ in range(count)], dtype=object),
        "truncated": np.zeros(count, dtype=bool),
        "residual": draw.normal(size=count).astype(np.float32),
        "grad_norm": draw.lognormal(size=count).astype(np.float32),
        "direct_nll": (3 + draw.random(count)).astype(np.float32),
        "embedding": draw.normal(size=(count, 8)).astype(np.float32),
        "gradient": draw.normal(size=(count, 4)).astype(np.float32),
        "influence": draw.normal(size=count).astype(np.float32),
    }
    tokens = {
        "token": draw.integers(0, 100, total),
        "position": np.concatenate([np.arange(5, 5 + length) for length in lengths] or [np.zeros(0)]).astype(np.int64),
        "nll": draw.gamma(1.0, 1.2, total).astype(np.float32),
        "entropy": draw.gamma(2.0, 0.7, total).astype(np.float32),
        "top1": draw.random(total) < 0.5,
        "el2n": draw.random(total).astype(np.float32),
        "reference_nll": draw.gamma(1.0, 1.2, total).astype(np.float32),
        "protected": np.zeros(total, dtype=bool),
        "paragraph": np.zeros(total, dtype=np.int64),
    }
    for name, column in columns.items():
        side = rows if name in rows else tokens
        side[name] = np.full_like(side[name], column) if np.isscalar(column) else np.asarray(column)
    return ScoreTable(
        row_ids(count, seed), np.concatenate([[0], np.cumsum(lengths)]), rows, tokens, {"weight_norm": 30.0}
    )


def means_table(targets: int = 2, **columns: np.ndarray) -> ScoreTable:
    """Rows whose token columns have the same given value at all of their tokens, so that means are exact."""
    count = len(next(iter(columns.values())))
    repeated = {
        name: np.repeat(np.asarray(column, dtype=np.float64), targets) if name in ("nll", "entropy", "el2n") else column
        for name, column in columns.items()
    }
    return random_table(count, targets=[targets] * count, **repeated)


NUMBERS = ("residual", "grad_norm", "direct_nll", "embedding", "influence", "nll", "entropy", "el2n", "reference_nll")


def filled(value: float, count: int = 12) -> ScoreTable:
    """A table whose every number is the same, with the same texts everywhere."""
    texts = {name: np.full(count, "the same text in every row of it", dtype=object) for name in ("prompt", "answer")}
    return random_table(count, **dict.fromkeys(NUMBERS, value), **texts)


def with_outlier(value: float = 1e30, count: int = 20) -> ScoreTable:
    """One row, the fourth, whose every number is ``value``."""
    table = random_table(count)
    rows, tokens = dict(table.rows), dict(table.tokens)
    span = slice(int(table.offsets[3]), int(table.offsets[4]))
    for name in NUMBERS:
        if name in rows:
            rows[name] = rows[name].copy()
            rows[name][3] = value
        else:
            tokens[name] = tokens[name].copy()
            tokens[name][span] = value
    return ScoreTable(table.ids, table.offsets, rows, tokens, table.facts)


def empty_table() -> ScoreTable:
    return random_table(1).pick(np.zeros(0, dtype=np.int64))
