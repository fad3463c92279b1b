"""Scores on disk: a folder of parquet shards and a header that says what they are scores of.

Rows are sorted by their content id and cut into shards of equal size, so neither the order of the file nor the number
of processes changes anything. A shard is written to a temporary name and renamed: what is there is whole, and a pass
that was stopped goes on with the shards that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prunetune.core.errors import DataError
from prunetune.core.files import new_file, new_folder, read_json, write_json
from prunetune.model.score_table import ROW_COLUMNS, TOKEN_COLUMNS, ScoreTable
from prunetune.model.token_rows import IGNORED_LABEL

HEADER = "header.json"
SHARDS = "shards"
SHARD_ROWS = 256
# What scores are scores of. Scores that differ in any of these must not be mixed.
IDENTITY = (
    *("tokenizer_hash", "template_hash", "max_length", "targets"),
    *("model_hash", "reference_hash", "rows_hash", "influence_hash"),
)


@dataclass(frozen=True)
class StoredScores:
    """Everything that selections are made from, rows sorted by id.

    Args:
        table: the statistics.
        examples: the rows as they were given to the chat template.
        input_ids: token ids of each row, after the cut.
        labels: of the same lengths; -100 where there is no target.
        header: what the scores are scores of, and what the pass cost.
    """

    table: ScoreTable
    examples: Sequence[dict[str, Any]]
    input_ids: Sequence[list[int]]
    labels: Sequence[list[int]]
    header: Mapping[str, Any]


def shard_path(folder: Path, number: int) -> Path:
    """Where shard ``number`` is written."""
    return folder / SHARDS / f"part-{number:05d}.parquet"


def write_shard(path: Path, scores: StoredScores) -> None:
    """Writes one shard in one step; a crash leaves nothing under its name."""
    table = scores.table
    columns: dict[str, Any] = {
        "id": list(table.ids),
        "example": [json.dumps(example, ensure_ascii=False) for example in scores.examples],
        "input_ids": [np.asarray(ids, dtype=np.int32) for ids in scores.input_ids],
        "labels": [np.asarray(labels, dtype=np.int32) for labels in scores.labels],
    }
    for name, column in table.rows.items():
        columns[f"row.{name}"] = list(column) if column.ndim > 1 else column
    for name, column in table.tokens.items():
        columns[f"token.{name}"] = np.split(column, table.offsets[1:-1])
    with new_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def write_scores(folder: Path, scores: StoredScores) -> None:
    """Writes a whole folder of scores at once.

    Raises:
        FileExistsError: ``folder`` exists.
    """
    with new_folder(folder) as temporary:
        for number, span in enumerate(spans(len(scores.table))):
            part = StoredScores(
                scores.table.pick(np.arange(span.start, span.stop)),
                scores.examples[span],
                scores.input_ids[span],
                scores.labels[span],
                {},
            )
            write_shard(shard_path(temporary, number), part)
        write_json(temporary / HEADER, {**scores.header, "complete": True})


def spans(rows: int) -> Iterator[slice]:
    """The rows of each shard."""
    return (slice(start, min(start + SHARD_ROWS, rows)) for start in range(0, rows, SHARD_ROWS))


def read_scores(folder: Path) -> StoredScores:
    """Reads a finished folder of scores.

    Raises:
        DataError: it is not one, it is unfinished, or a shard is damaged.
    """
    header = read_header(folder)
    try:
        return _read(Path(folder), header)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"a shard of {folder} cannot be read ({error}); score into a new folder") from error


def _read(folder: Path, header: dict[str, Any]) -> StoredScores:
    if not header.get("complete"):
        raise DataError(
            f"the scoring pass into {folder} was not finished. Run the same `prunetune data score` command again: it "
            "goes on with what is missing"
        )
    whole = pa.concat_tables([pq.read_table(path) for path in sorted((folder / SHARDS).glob("part-*.parquet"))])
    if len(whole) != header.get("rows", len(whole)):
        raise ValueError(f"{header['rows']} rows were scored and {len(whole)} are there")
    lengths = whole["token.position"].combine_chunks().value_lengths().to_numpy() if len(whole) else np.zeros(0)
    table = ScoreTable(
        whole["id"].to_pylist(),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        {name: _rows(whole[f"row.{name}"]) for name in ROW_COLUMNS if f"row.{name}" in whole.column_names},
        {name: _tokens(whole[f"token.{name}"]) for name in TOKEN_COLUMNS if f"token.{name}" in whole.column_names},
        header.get("facts", {}),
    )
    found = StoredScores(
        table,
        [json.loads(text) for text in whole["example"].to_pylist()],
        whole["input_ids"].to_pylist(),
        whole["labels"].to_pylist(),
        header,
    )
    _require_sound(found)
    return found


def _require_sound(scores: StoredScores) -> None:
    """Raises ValueError unless rows, labels and token statistics belong to each other."""
    if list(scores.table.ids) != sorted(scores.table.ids):
        raise ValueError("the rows are not in the order of their ids")
    positions = scores.table.tokens["position"]
    for row, (ids, labels) in enumerate(zip(scores.input_ids, scores.labels)):
        targets = positions[scores.table.offsets[row] : scores.table.offsets[row + 1]]
        there = [place for place, label in enumerate(labels) if label != IGNORED_LABEL]
        if len(ids) != len(labels) or targets.tolist() != there:
            raise ValueError(f"row {scores.table.ids[row]}: labels and token statistics are not of the same tokens")


def read_header(folder: Path) -> dict[str, Any]:
    """What a folder's scores are scores of.

    Raises:
        DataError: there is no header.
    """
    path = Path(folder) / HEADER
    if not path.is_file():
        raise DataError(f"{folder} holds no scores: {path.name} is missing. Make them with `prunetune data score`")
    try:
        header = read_json(path)
        if not isinstance(header, dict) or not isinstance(header.get("facts", {}), dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); score into a new folder") from error
    return header


def require_same(header: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raises DataError if scores of something else are in ``folder``, naming what differs."""
    names = [name for name in IDENTITY if header.get(name) != wanted.get(name)]
    if names:
        said = "; ".join(f"{name}: {header.get(name)} there, {wanted.get(name)} now" for name in names)
        raise DataError(f"{folder} holds scores of something else ({said}). Name another folder for these")


def _rows(column: pa.ChunkedArray) -> np.ndarray:
    """(N, ...) values; texts stay Python strings."""
    if pa.types.is_list(column.type):
        return np.stack([np.asarray(value, dtype=np.float32) for value in column.to_pylist()])
    if pa.types.is_string(column.type):
        return np.array(column.to_pylist(), dtype=object)
    values: np.ndarray = column.to_numpy()
    return values


def _tokens(column: pa.ChunkedArray) -> np.ndarray:
    """(T,) values of all rows, one after the other."""
    values: np.ndarray = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values
