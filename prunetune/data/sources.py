"""Where rows come from: files, saved folders, the hub. What is in the rows is ``formats.py``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.core.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# Where `prunetune data select` puts the rows inside its folder.
SELECTED = "dataset"
VALIDATION_NAMES = ("validation", "valid", "dev", "eval")


@dataclass(frozen=True)
class Rows:
    """Rows and where each stands. ``unit`` is line for text files, else row; both count from 1."""

    name: str
    values: list[dict[str, Any]]
    places: list[int]
    unit: str = "row"


def bad_rows_error(rows: Rows, faults: Mapping[int, str], advice: str) -> DataError:
    """All faults at once: the first five in words, then every place.

    Args:
        faults: place of the row (see ``Rows.places``) -> what is wrong with it.
    """
    shown = [f"  {rows.unit} {place}: {faults[place]}" for place in sorted(faults)[:5]]
    places = sorted(faults)
    total = max(len(rows.values), len(places))
    head = f"{rows.name}: {len(places)} of {total} rows cannot be used"
    rest = [f"  all of them: {rows.unit}s {_ranges(places)}"] if len(places) > 5 else []
    return DataError("\n".join([head, *shown, *rest, advice]))


def _ranges(places: list[int]) -> str:
    """``1-3, 7`` for 1, 2, 3, 7."""
    spans: list[list[int]] = []
    for place in places:
        if spans and place == spans[-1][1] + 1:
            spans[-1][1] = place
        else:
            spans.append([place, place])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def read(source: str, field: str, folder: Path | None = None) -> dict[str, Rows]:
    """Rows by split name; a plain file has one split, ``train``.

    Args:
        source: a file, a folder saved by ``datasets``, or a hub id (``id``, ``id:config``).
        field: the setting it came from, for messages, e.g. ``data.train``.
        folder: where relative paths are also looked for.

    Raises:
        DataError: nothing is there, it is empty, or it cannot be read.
    """
    path = find(source, folder)
    if path is None:
        if Path(source).suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
            where = f" (looked in {Path.cwd()}{f' and {folder}' if folder else ''})"
            raise DataError(f"{field} is {source}, and there is no such file or folder{where}. Check the path")
        splits = _from_hub(source, field)
    elif path.is_dir():
        splits = _from_folder(path, field)
    elif path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{field} is {source}: files of this kind are not read. Use {', '.join(SUFFIXES)}")
    elif path.stat().st_size == 0:
        raise DataError(f"{field} is {source}, and the file is empty. Give a file with at least two rows")
    else:
        readers: dict[str, Callable[[Path], Rows]] = {
            ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet,
        }  # fmt: skip
        splits = {"train": readers[path.suffix.lower()](path)}
    if not any(rows.values for rows in splits.values()):
        raise DataError(f"{field} is {source}, and there are no rows in it. Give a source with at least two rows")
    return splits


def find(source: str, folder: Path | None) -> Path | None:
    """The local file or folder meant by ``source``: from the working directory, then from ``folder``."""
    path = Path(source).expanduser()
    for candidate in (path, *([folder / path] if folder else [])):
        if candidate.exists():
            return candidate
    return None


def read_jsonl(path: Path) -> tuple[Rows, dict[int, str]]:
    """The lines of a file that are JSON objects, and what is wrong with the others, by line number."""
    rows = Rows(path.name, [], [], "line")
    faults: dict[int, str] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
                fault = None if isinstance(value, dict) else f"is {type(value).__name__}, not an object {{...}}"
            except json.JSONDecodeError as error:
                fault = f"is not JSON: {error.msg} at column {error.colno}"
            except (RecursionError, ValueError) as error:
                fault = f"is not JSON that can be read: {error}"
            if fault:
                faults[number] = fault
            else:
                rows.values.append(value)
                rows.places.append(number)
    return rows, faults


def _read_jsonl(path: Path) -> Rows:
    rows, faults = read_jsonl(path)
    if faults:
        whole = Rows(rows.name, [{}] * (len(rows.values) + len(faults)), [], rows.unit)
        raise bad_rows_error(whole, faults, "Each line must be one JSON object; fix or remove these lines")
    return rows


def _read_json(path: Path) -> Rows:
    """A JSON array of rows, an object that holds one under a single key, or JSON lines after all."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_jsonl(path)
        raise DataError(
            f"{path.name} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}. Fix it there"
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path.name} is not JSON that can be read: {error}. Write it again") from error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 and len(value) == 1 else [value]
    rows = Rows(path.name, [], [])
    faults = {
        number: f"is {type(item).__name__}, not an object"
        for number, item in enumerate(value if isinstance(value, list) else [value], 1)
        if not isinstance(item, dict)
    }
    if faults:
        raise bad_rows_error(rows, faults, "Write a list of objects: [{...}, {...}]")
    return Rows(path.name, value, list(range(1, len(value) + 1)))


def _read_csv(path: Path) -> Rows:
    """A header and rows; an empty cell is no value. A row's place is the line where it ends."""
    rows = Rows(path.name, [], [], "line")
    faults: dict[int, str] = {}
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    for value in reader:
        if None in value:
            faults[reader.line_num] = f"has {len(value[None])} cells more than the header; quote texts with commas"
        rows.values.append({name: cell or None for name, cell in value.items() if name is not None})
        rows.places.append(reader.line_num)
    if faults:
        raise bad_rows_error(rows, faults, "Write every row with as many cells as the header has")
    return rows


def read_text(path: Path) -> str:
    """A UTF-8 file's text; raises DataError with the line that is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path.name} is not UTF-8 text (line {line}). Save it as UTF-8") from error


def _read_parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        values = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path.name} cannot be read as parquet: {error}. Write it again") from error
    return Rows(path.name, values, list(range(1, len(values) + 1)))


def _from_folder(path: Path, field: str) -> dict[str, Rows]:
    import datasets
    import pyarrow as pa

    if (path / SELECTED).is_dir():
        path = path / SELECTED
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{field} is {path}, and this folder was not saved by datasets' save_to_disk. Name a file in it instead"
        ) from error
    return _splits(loaded, path.name)


def _from_hub(source: str, field: str) -> dict[str, Rows]:
    import datasets
    from huggingface_hub.errors import HFValidationError

    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except HFValidationError as error:
        raise DataError(f"{field} is {source!r}: no such file, and no name that the hub could have") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{field} is {source!r}: no such file or folder here, and it could not be loaded from the hub "
            "either "
            f"({_first_line(error)}). Check the spelling and the network, name a configuration as "
            f"{name}:config, or use "
            "a local file, or pydocs, which needs no network"
        ) from error
    return _splits(loaded, source)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _splits(loaded: Any, name: str) -> dict[str, Rows]:
    """Rows of a Dataset or of each split of a DatasetDict."""

    def rows(dataset: Any, label: str) -> Rows:
        return Rows(label, dataset.to_list(), list(range(1, len(dataset) + 1)))

    if not isinstance(loaded, Mapping):
        return {"train": rows(loaded, name)}
    return {split: rows(dataset, f"{name}[{split}]") for split, dataset in loaded.items()}


def training_rows(splits: Mapping[str, Rows]) -> Rows:
    """The split named train, or else the only or first one."""
    return splits.get("train") or next(iter(splits.values()))


def held_out_rows(splits: Mapping[str, Rows]) -> Rows | None:
    """The split made for validation beside a training split, if there is one. A test split is left alone."""
    return next((splits[name] for name in VALIDATION_NAMES if name in splits and len(splits) > 1), None)
