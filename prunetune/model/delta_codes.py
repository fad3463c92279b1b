"""Where the survivors of a pruned matrix stand, in few bytes: gaps between them, or a bit an entry.

Rows are coded apart, so any rows can be read without the ones before. A row's gaps are the dropped entries before each
survivor, a byte each: 255 stands for 255 dropped entries and more to come.
Legend: b x n a block of rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MORE = 255


def gap_lengths(stays: Tensor) -> Tensor:
    """(b,) int64: bytes that ``gaps`` takes for each row of (b, n) bool."""
    row, gap = _survivors(stays)
    return torch.zeros(len(stays), dtype=torch.int64).index_add_(0, row, gap // _MORE + 1)


def gaps(stays: Tensor) -> Tensor:
    """uint8, one row after the other: the places of the survivors of (b, n) bool."""
    _, gap = _survivors(stays)
    ends = (gap // _MORE + 1).cumsum(0) - 1
    coded = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), _MORE, dtype=torch.uint8)
    coded[ends] = (gap % _MORE).to(torch.uint8)
    return coded


def from_gaps(coded: Tensor, lengths: Tensor, columns: int) -> Tensor | None:
    """(b, n) bool that ``gaps`` coded; None if there is none.

    Args:
        coded: uint8. lengths: (b,) int64, bytes of each row, which add up to ``coded``'s. columns: n.
    """
    steps = torch.where(coded == _MORE, _MORE, coded.long() + 1)
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    passed = torch.zeros(len(coded) + 1, dtype=torch.int64)
    passed[1:] = steps.cumsum(0)
    before_row = passed[lengths.cumsum(0) - lengths]
    survivors = coded != _MORE
    # A row ends with a survivor, and the last one is its furthest.
    last = (lengths.cumsum(0) - 1)[lengths > 0]
    place = (passed[1:] - before_row[row] - 1)[survivors]
    if not bool(survivors[last].all()) or bool((place >= columns).any()):
        return None
    stays = torch.zeros(len(lengths), columns, dtype=torch.bool)
    stays[row[survivors], place] = True
    return stays


def bits(stays: Tensor) -> Tensor:
    """(b * ceil(n / 8),) uint8: a bit an entry of (b, n) bool, lowest first; every row begins with a byte."""
    return torch.from_numpy(np.packbits(stays.numpy(), axis=1, bitorder="little")).flatten()


def from_bits(coded: Tensor, columns: int) -> Tensor:
    """(b, n) bool that ``bits`` coded."""
    packed = coded.reshape(-1, bits_width(columns)).numpy()
    return torch.from_numpy(np.unpackbits(packed, axis=1, count=columns, bitorder="little")).bool()


def bits_width(columns: int) -> int:
    """Bytes of a row of ``bits``."""
    return -(-columns // 8)


def _survivors(stays: Tensor) -> tuple[Tensor, Tensor]:
    """(row, dropped entries since the survivor before it in its row) of every survivor, int64."""
    row, column = stays.nonzero(as_tuple=True)
    before = torch.full_like(column, -1)
    same = row[1:] == row[:-1]
    before[1:][same] = column[:-1][same]
    return row, column - before - 1
