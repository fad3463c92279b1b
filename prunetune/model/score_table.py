"""What one scoring pass found: a table of rows and of their target tokens, in numpy, from which selections are made.

Legend: N rows, T target tokens of all rows together. The tokens of row i are ``offsets[i]`` to ``offsets[i + 1]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prunetune.core.errors import DataError

# Columns that a pass may fill. A method names the ones it needs.
ROW_COLUMNS = {
    "length": "tokens of the row after the cut, int",
    "source": "name of the file or set it came from, str",
    "label": "the row's own label column, str",
    "prompt": "text before the answer, str",
    "answer": "text of the answer, str",
    "truncated": "the answer was cut at max_length, bool",
    "residual": "sum over targets of (expected logit - target's logit), over the number of targets: <W, dL/dW>",
    "grad_norm": "norm of the gradient of the row's mean loss with respect to the output layer's weight",
    "direct_nll": "mean negative log-likelihood of the answer without its prompt, nats",
    "embedding": "(N, D) mean last hidden state, float32",
    "influence": "similarity of the row's gradient to the validation rows' (LESS), float32",
}
TOKEN_COLUMNS = {
    "token": "token id, int",
    "position": "index in the row's input ids, int",
    "nll": "negative log-likelihood in nats, float32",
    "entropy": "of the predicted distribution in nats, float32",
    "top1": "the target was the likeliest token, bool",
    "el2n": "norm of (predicted distribution - one-hot target), float32",
    "reference_nll": "the reference model's negative log-likelihood, float32",
    "protected": "must stay: end of turn, template control tokens, final answer, bool",
    "paragraph": "number of the paragraph it stands in, from 0, int; the last one is never removed",
}


@dataclass(frozen=True)
class ScoreTable:
    """Statistics of N rows and their target tokens.

    Args:
        ids: a content hash for every row; all different.
        offsets: (N + 1,) int64, where each row's tokens begin in the token columns.
        rows: column -> (N, ...) array, see ROW_COLUMNS.
        tokens: column -> (T,) array, see TOKEN_COLUMNS.
        facts: numbers about the whole pass, e.g. ``weight_norm`` (of the output layer).

    Raises:
        ValueError: columns of different lengths, or an id that occurs twice.
    """

    ids: Sequence[str]
    offsets: np.ndarray
    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    tokens: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("two rows have the same id")
        if len(self.offsets) != len(self.ids) + 1:
            raise ValueError(f"{len(self.ids)} rows need {len(self.ids) + 1} offsets, not {len(self.offsets)}")
        for name, column in self.rows.items():
            if len(column) != len(self.ids):
                raise ValueError(f"row column {name} has {len(column)} entries for {len(self.ids)} rows")
        for name, column in self.tokens.items():
            if len(column) != int(self.offsets[-1]):
                raise ValueError(f"token column {name} has {len(column)} entries for {int(self.offsets[-1])} tokens")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> np.ndarray:
        """(N,) target tokens of each row."""
        return np.diff(self.offsets)

    @property
    def row_of_token(self) -> np.ndarray:
        """(T,) index of the row that each token belongs to."""
        return np.repeat(np.arange(len(self)), self.targets)

    def total(self, tokens_T: np.ndarray) -> np.ndarray:
        """(N,) float64 sums over each row's tokens."""
        sums: np.ndarray = np.bincount(self.row_of_token, weights=tokens_T.astype(np.float64), minlength=len(self))
        return sums

    def mean(self, tokens_T: np.ndarray) -> np.ndarray:
        """(N,) float64 means over each row's tokens; NaN for a row without targets."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means: np.ndarray = self.total(tokens_T) / self.targets
        return means

    def require(self, columns: Iterable[str], what: str) -> None:
        """Raises DataError if a column is missing, saying which pass fills it."""
        missing = sorted(set(columns) - set(self.rows) - set(self.tokens))
        if missing:
            known = {**ROW_COLUMNS, **TOKEN_COLUMNS}
            listed = "; ".join(f"{name} ({known.get(name, 'unknown column')})" for name in missing)
            raise DataError(
                f"{what} needs what these scores do not have: {listed}. Score again with the option that adds it "
                "(prunetune data score --help)"
            )

    def pick(self, index: np.ndarray) -> ScoreTable:
        """The table with only these rows, in this order; ``index`` holds row numbers or is a (N,) bool mask."""
        index = np.flatnonzero(index) if index.dtype == bool else np.asarray(index, dtype=np.int64)
        counts = self.targets[index]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        take = np.repeat(self.offsets[index] - offsets[:-1], counts) + np.arange(int(offsets[-1]))
        return ScoreTable(
            [self.ids[int(i)] for i in index],
            offsets,
            {name: column[index] for name, column in self.rows.items()},
            {name: column[take] for name, column in self.tokens.items()},
            self.facts,
        )
