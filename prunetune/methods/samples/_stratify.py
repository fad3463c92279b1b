"""Strata of rows and a choice that keeps their proportions, whatever the method. Legend: N rows, S strata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from prunetune.core.errors import DataError
from prunetune.methods.samples import SampleChoice, SampleMethod
from prunetune.methods.samples._repeats import RepeatFilter
from prunetune.model.score_table import ScoreTable

Stratum = Literal["source", "label", "length"]


def make_strata(table: ScoreTable, by: Sequence[Stratum], bins: int = 4) -> np.ndarray:
    """(N,) str, the stratum of each row: the values of all of ``by`` together.

    Args:
        table: the rows. ``source`` and ``label`` are its columns, ``length`` is the number of target tokens.
        by: one or more of source, label, length.
        bins: length bins of about equally many rows each, fewer where many rows are equally long.

    Raises:
        DataError: a column is missing.

    Example:
        >>> table = ScoreTable(["a", "b"], np.array([0, 1, 3]), {"source": np.array(["x", "y"])})
        >>> make_strata(table, ["source", "length"], bins=2).tolist()
        ['x, 1-1 targets', 'y, 2-2 targets']
    """
    columns = []
    for name in by:
        if name == "length":
            columns.append(_length_bins(table.targets, bins))
        else:
            table.require([name], f"strata by {name}")
            columns.append([str(value) for value in table.rows[name]])
    names = [", ".join(parts) for parts in zip(*columns, strict=True)] if columns else [""] * len(table)
    return np.array(names, dtype=object)


def _length_bins(lengths: np.ndarray, bins: int) -> list[str]:
    """A name for each row's bin between quantiles of the lengths, after the shortest and the longest inside it."""
    if not len(lengths):
        return []
    edges = np.quantile(lengths, np.arange(1, bins) / bins)
    numbers = np.searchsorted(edges, lengths, side="left")
    names = {
        number: f"{lengths[numbers == number].min()}-{lengths[numbers == number].max()} targets"
        for number in np.unique(numbers)
    }
    return [names[number] for number in numbers]


def choose_stratified(
    method: SampleMethod, table: ScoreTable, count: int, strata: np.ndarray, minimum: int | float = 0
) -> SampleChoice:
    """What ``method`` chooses in each stratum by itself, the strata in proportion to their rows with targets.

    What a stratum cannot give, because the method judges or allows fewer of its rows, goes to the others. Methods
    against repeats look for them in all strata together and share out the rows that are left.

    Args:
        method: ranks or chooses inside each stratum.
        table: the rows.
        count: rows kept in all.
        strata: (N,) str, see ``make_strata``.
        minimum: at least so many rows of each stratum, or all if it has fewer; a float in [0, 1] is a fraction of
            ``count``, rounded up.

    Returns:
        The choices of all strata; its threshold is None unless one border holds for all of them.

    Raises:
        DataError: the minimums together are more than ``count``.
    """
    table.require(method.needs, type(method).__name__)
    if isinstance(method, RepeatFilter):
        # A row and its copy may stand in two strata: who repeats whom is found in all of them first.
        whole = method.choose(table, len(table))
        rest = whole.keep
        drawn = choose_stratified(method.lottery(), table.pick(rest), count, strata[rest], minimum)
        keep, reason = rest.copy(), whole.reason.copy()
        keep[rest] = drawn.keep
        reason[rest & ~keep] = "not_drawn"
        return replace(whole, keep=keep, reason=reason)
    count = min(max(0, count), int((table.targets > 0).sum()))
    names = sorted(set(strata.tolist()))
    rows = [np.flatnonzero(strata == name) for name in names]
    room = np.array([int((table.targets[index] > 0).sum()) for index in rows], dtype=np.int64)
    least = _least(room, minimum, count)
    parts = [table.pick(index) for index in rows]
    choices: dict[tuple[int, int], SampleChoice] = {}
    size = room.copy()
    while True:
        quotas = split_count(count, size, np.minimum(least, room), room)
        for number, quota in enumerate(quotas.tolist()):
            if (number, quota) not in choices:
                choices[number, quota] = method.choose(parts[number], quota)
        found = [choices[number, quota] for number, quota in enumerate(quotas.tolist())]
        kept = np.array([int(choice.keep.sum()) for choice in found], dtype=np.int64)
        if not (kept < quotas).any():
            return _merge(len(table), rows, found)
        room = np.where(kept < quotas, kept, room)


def split_count(count: int, size_S: np.ndarray, least_S: np.ndarray, room_S: np.ndarray) -> np.ndarray:
    """(S,) int64 parts of ``count`` in proportion to ``size_S`` by largest remainder, inside their bounds.

    Args:
        count: how many in all; fewer are given where ``room_S`` together is smaller.
        size_S: what the parts are proportional to.
        least_S, room_S: the smallest and the largest part allowed, least <= room.

    Example:
        >>> split_count(10, np.array([90, 9, 1]), np.array([0, 0, 1]), np.array([90, 9, 1])).tolist()
        [8, 1, 1]
    """
    parts = np.minimum(least_S, room_S).astype(np.int64)
    open_S = np.ones(len(size_S), dtype=bool)
    share_S = np.zeros(len(size_S))
    # A part whose share lies outside its bounds is fixed there and the others share the rest, until none is outside:
    # first those that need more, then those that can take less, as fixing one kind moves the other's shares.
    while open_S.any():
        rest = count - int(parts[~open_S].sum())
        weight = float(size_S[open_S].sum())
        share_S = np.where(open_S, max(0, rest) * size_S / weight if weight else 0.0, parts)
        below = open_S & (share_S < least_S)
        above = open_S & (share_S > room_S)
        missing, excess = (least_S - share_S)[below].sum(), (share_S - room_S)[above].sum()
        fix = below if missing >= excess else above
        if not fix.any():
            break
        parts = np.where(fix, np.where(below, least_S, room_S), parts).astype(np.int64)
        open_S &= ~fix
    parts = np.where(open_S, np.floor(share_S + 1e-9), parts).astype(np.int64)
    remainder = np.where(open_S & (parts < room_S), share_S - parts, -1.0)
    for number in np.argsort(-np.round(remainder, 9), kind="stable")[: max(0, count - int(parts.sum()))]:
        parts[number] += remainder[number] >= 0
    return parts


def _least(size: np.ndarray, minimum: int | float, count: int) -> np.ndarray:
    wanted = math.ceil(round(minimum * count, 9)) if isinstance(minimum, float) else minimum
    least = np.minimum(wanted, size)
    if least.sum() > count:
        raise DataError(
            f"a minimum of {minimum} for each of {len(size)} strata is {int(least.sum())} rows, but only {count} are "
            "kept; keep more rows, set a smaller minimum, or make fewer strata"
        )
    return least


def _merge(total: int, rows: Sequence[np.ndarray], choices: Sequence[SampleChoice]) -> SampleChoice:
    """One choice of ``total`` rows from the choices of their strata, each about its own ``rows``."""

    def joined(column: str, empty: object, dtype: type) -> np.ndarray | None:
        if all(getattr(choice, column) is None for choice in choices):
            return None
        whole: np.ndarray = np.full(total, empty, dtype=dtype)
        for index, choice in zip(rows, choices, strict=True):
            part = getattr(choice, column)
            whole[index] = empty if part is None else part
        return whole

    def present(column: str, empty: object, dtype: type) -> np.ndarray:
        whole = joined(column, empty, dtype)
        return np.full(total, empty, dtype=dtype) if whole is None else whole

    return SampleChoice(
        present("keep", False, bool),
        present("value", np.nan, float),
        present("reason", "", object),
        choices[0].threshold if len(choices) == 1 else None,
        joined("prunable", True, bool),
        joined("weight", 1.0, float),
        joined("other", "", object),
    )
