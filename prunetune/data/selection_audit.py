"""One row of audit per scored row: what was decided, why, and the numbers that it was decided from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from prunetune.data.selection import Selection
from prunetune.methods import reasons
from prunetune.methods.ranking import percentiles

AUDIT, TOKENS = "audit.parquet", "tokens.parquet"
_MOST_NLL = 20.0


def audit_rows(selection: Selection) -> pa.Table:
    """The audit: a table with one row per scored row, sorted by id."""
    table, choice = selection.scores.table, selection.choice
    kept_N = table.total(selection.kept).astype(np.int64)
    empty = np.full(len(table), "", dtype=object)
    decisions = np.where(~choice.keep, "drop", np.where(kept_N < table.targets, "mask", "keep")).astype(object)
    columns: dict[str, Any] = {
        "id": list(table.ids),
        "source": [str(name) for name in table.rows.get("source", empty)],
        "label": [str(name) for name in table.rows.get("label", empty)],
        "n_tokens": np.array([len(ids) for ids in selection.scores.input_ids], dtype=np.int64),
        "n_target": table.targets,
        "n_target_kept": kept_N,
        "value": np.asarray(choice.value, dtype=np.float64),
        "threshold": pa.array([choice.threshold] * len(table), type=pa.float64()),
        "percentile": percentiles(choice.value),
        "decision": list(decisions),
        "reason": [str(reason) for reason in choice.reason],
        "duplicate_of": [str(name) for name in (empty if choice.other is None else choice.other)],
        "weight": np.where(choice.keep, 1.0 if choice.weight is None else choice.weight, 0.0),
        **_scores(selection),
    }
    columns["sentence"] = [
        _sentence(selection, row, str(decisions[row]), int(kept_N[row])) for row in range(len(table))
    ]
    return pa.table(columns)


def _scores(selection: Selection) -> dict[str, np.ndarray]:
    """(N,) statistics of each row, whatever the method used."""
    table = selection.scores.table
    found: dict[str, np.ndarray] = {}
    for column, name in (("nll", "loss"), ("entropy", "entropy"), ("top1", "top1"), ("el2n", "el2n")):
        if column in table.tokens:
            found[name] = table.mean(table.tokens[column])
    if "loss" in found:
        found["ppl"] = np.exp(np.minimum(found["loss"], _MOST_NLL))
    if "loss" in found and "reference_nll" in table.tokens:
        found["excess"] = found["loss"] - table.mean(table.tokens["reference_nll"])
    if "loss" in found and "direct_nll" in table.rows:
        with np.errstate(divide="ignore", invalid="ignore"):
            found["ifd"] = found["loss"] / table.rows["direct_nll"]
    for name in ("residual", "grad_norm", "influence", "truncated"):
        if name in table.rows:
            found[name] = table.rows[name]
    return found


def meaning(selection: Selection, reason: str) -> str:
    """What a reason code says of a row, in words."""
    method = selection.settings.samples_method or "the selection"
    return reasons.meaning(reason, method, f"the {int(selection.choice.keep.sum())} rows")


def _sentence(selection: Selection, row: int, decision: str, kept: int) -> str:
    choice, settings = selection.choice, selection.settings
    reason = str(choice.reason[row])
    parts = [f"{'dropped' if decision == 'drop' else 'kept'}: {meaning(selection, reason)}"]
    value = float(choice.value[row])
    if np.isfinite(value):
        border = f", the border is {choice.threshold:.4g}" if choice.threshold is not None else ""
        parts.append(f"value {value:.4g}{border}")
    if choice.other is not None and choice.other[row]:
        parts.append(f"it repeats {choice.other[row]}")
    if decision == "mask":
        gone = int(selection.scores.table.targets[row]) - kept
        where = "leave the text" if selection.removes else "are left out of the loss"
        parts.append(f"{gone} of {gone + kept} target tokens {where} ({settings.tokens_method})")
    return "; ".join(parts)


def token_rows(selection: Selection) -> pa.Table:
    """Token ids of every scored row, and its target and kept tokens as runs: start, length, start, length ..."""
    table = selection.scores.table
    spans = [slice(int(table.offsets[row]), int(table.offsets[row + 1])) for row in range(len(table))]
    positions = table.tokens["position"]
    return pa.table(
        {
            "id": list(table.ids),
            "input_ids": pa.array([np.asarray(ids, dtype=np.int32) for ids in selection.scores.input_ids]),
            "targets": pa.array([to_runs(positions[span]) for span in spans], type=pa.list_(pa.int32())),
            "kept": pa.array([to_runs(positions[span][selection.kept[span]]) for span in spans], pa.list_(pa.int32())),
        }
    )


def to_runs(positions: np.ndarray) -> np.ndarray:
    """Ascending positions as start, length, start, length ...

    Example:
        >>> to_runs(np.array([3, 4, 5, 9])).tolist()
        [3, 3, 9, 1]
    """
    if not len(positions):
        return np.zeros(0, dtype=np.int32)
    first = np.flatnonzero(np.append(True, np.diff(positions) != 1))
    lengths = np.diff(np.append(first, len(positions)))
    return np.stack([positions[first], lengths], axis=1).reshape(-1).astype(np.int32)


def from_runs(runs: Sequence[int], length: int) -> np.ndarray:
    """(length,) bool, True inside the runs."""
    inside = np.zeros(length, dtype=bool)
    for start, count in zip(runs[::2], runs[1::2]):
        inside[start : start + count] = True
    return inside
