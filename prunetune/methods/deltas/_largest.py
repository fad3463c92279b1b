"""Keeping the largest entries: of each row at once, or of a whole tensor in two passes that never hold it.

Legend: m x n the delta's shape, b rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prunetune.model.deltas import Delta, Mapped

_BITS = 16
Score = Callable[[Tensor], Tensor]


def share_of(count: int, keep: float) -> int:
    """Of ``count`` entries, rounded down as in mergekit and PEFT; 1 - 0.7 of ten are three all the same."""
    return math.floor(keep * count + 1e-6)


def largest_of_rows(delta: Delta, count: int, score: Score, skip: int = 0) -> Delta:
    """Of every row the ``count`` entries with the highest scores after ``skip``; of equals the ones further left."""

    def change(block: Tensor, start: int, stop: int) -> Tensor:
        order = torch.sort(score(block), dim=1, descending=True, stable=True).indices[:, skip : skip + count]
        return torch.zeros_like(block).scatter_(1, order, block.gather(1, order))

    return Mapped(delta, change)


def shares(deltas: Mapping[str, Delta], count: int) -> dict[str, int]:
    """How many of the ``count`` largest entries of all tensors each one has; of equals the earlier tensors' first."""
    sizes = {name: delta.shape[0] * delta.shape[1] for name, delta in deltas.items()}
    if count <= 0 or count >= sum(sizes.values()):
        return dict.fromkeys(deltas, 0) if count <= 0 else sizes
    value, ties = _value_at(list(deltas.values()), count)
    found = {}
    for name, delta in deltas.items():
        larger = tied = 0
        for _, block in delta.blocks():
            bits = _bits(block)
            larger, tied = larger + int((bits > value).sum()), tied + int((bits == value).sum())
        found[name] = larger + min(ties, tied)
        ties -= min(ties, tied)
    return found


def largest_of_tensor(delta: Delta, count: int, skip: int = 0) -> Delta:
    """The ``count`` entries of the tensor that are largest after the ``skip`` largest; of equals the ones before.

    The bounds are exact: the bits of a positive float32, read as an integer, have its order, so two passes of 2^16
    bins find any rank. A third finds where ties begin and end in each block.
    """
    if count <= 0:
        return Mapped(delta, lambda block, start, stop: torch.zeros_like(block))
    bounds = [_nth_largest(delta, rank) for rank in ((skip, skip + count) if skip else (count,))]
    ties_before = {value: _ties_by_row(delta, value) for value, _ in bounds if value is not None}

    def below(block: Tensor, start: int, bound: tuple[int | None, int]) -> Tensor:
        """(b, n) bool: whether an entry comes before the rank that ``bound`` stands for."""
        value, ties = bound
        if value is None:
            return torch.ones_like(block, dtype=torch.bool)
        bits = _bits(block)
        tied = bits == value
        number = tied.flatten().cumsum(0).reshape(tied.shape) + int(ties_before[value][start])
        return (bits > value) | (tied & (number <= ties))

    def change(block: Tensor, start: int, stop: int) -> Tensor:
        inside = below(block, start, bounds[-1])
        return block * (inside & ~below(block, start, bounds[0]) if skip else inside)

    return Mapped(delta, change)


def _bits(block: Tensor) -> Tensor:
    """(b, n) int64 that order as the absolute values do."""
    return block.abs().float().view(torch.int32).long()


def _nth_largest(delta: Delta, rank: int) -> tuple[int | None, int]:
    """As ``_value_at`` for one tensor; None if it has no more entries."""
    m, n = delta.shape
    return (None, 0) if rank >= m * n else _value_at([delta], rank)


def _value_at(deltas: Sequence[Delta], rank: int) -> tuple[int, int]:
    """(bits of the smallest of the ``rank`` largest, how many of its equals are among them)."""
    top, above = _bin_of(_histogram(deltas, lambda bits: bits >> _BITS), rank)
    low = _histogram(deltas, lambda bits: torch.where(bits >> _BITS == top, bits & (2**_BITS - 1), -1))
    bottom, more = _bin_of(low, rank - above)
    return (top << _BITS) + bottom, rank - above - more


def _histogram(deltas: Sequence[Delta], key: Callable[[Tensor], Tensor]) -> Tensor:
    total = torch.zeros(2**_BITS, dtype=torch.int64)
    for delta in deltas:
        for _, block in delta.blocks():
            keys = key(_bits(block)).flatten()
            total += torch.bincount(keys[keys >= 0], minlength=2**_BITS)
    return total


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """(bin that holds the rank-th largest, how many are in larger bins)."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, torch.tensor(max(rank, 1))))
    return len(histogram) - 1 - place, int(from_top[place - 1]) if place else 0


def _ties_by_row(delta: Delta, value: int) -> Tensor:
    """(m + 1,) entries equal to ``value`` in the rows before each row."""
    counts = [(_bits(block) == value).sum(1) for _, block in delta.blocks()]
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
