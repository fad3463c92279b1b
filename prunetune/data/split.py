"""Which rows are held out: decided by their content alone, so that the order of a file does not matter."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any


def content_key(*parts: Any) -> str:
    """A hash of JSON-like values; equal on every machine and in every process."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def distinct(rows: Sequence[Any]) -> list[int]:
    """Indices of the rows that repeat no earlier row exactly."""
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(content_key(row), index)
    return list(first.values())


def hold_out(groups: Sequence[Hashable], wanted: int, *, largest: float = 1.0) -> set[Hashable]:
    """Groups to hold out, whole, so that they hold at most ``wanted`` rows together.

    Args:
        groups: the group of every row; rows of one group never end up on both sides.
        wanted: rows to hold out.
        largest: a group with more than this share of ``wanted`` rows is never held out.

    Returns:
        The groups. If none is small enough, the smallest one, unless it has most of the rows: then nothing.
    """
    sizes = Counter(groups)
    chosen: set[Hashable] = set()
    rows = 0
    for group in sorted(sizes, key=lambda group: content_key("held out", group)):
        if sizes[group] <= largest * wanted and rows + sizes[group] <= wanted and len(chosen) + 1 < len(sizes):
            chosen.add(group)
            rows += sizes[group]
    if not chosen and sizes:
        smallest = min(sizes, key=lambda group: (sizes[group], content_key("held out", group)))
        if 2 * sizes[smallest] <= len(groups):
            chosen.add(smallest)
    return chosen


def sample(rows: Sequence[Any], count: int | None, *names: str | int) -> list[int]:
    """Indices of at most ``count`` rows, chosen by content, ascending; 100 rows are part of 200 rows."""
    if count is None or len(rows) <= count:
        return list(range(len(rows)))
    ranked = sorted(range(len(rows)), key=lambda index: content_key(*names, rows[index]))
    return sorted(ranked[:count])
