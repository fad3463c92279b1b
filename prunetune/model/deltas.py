"""Deltas: what tuning added to one weight matrix, as something that hands out blocks of rows and is never whole.

Legend: M x N the dense tensor, m x n what is left of it in a pruned model (equal if nothing was pruned), r LoRA rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunetune.core.streams import lattice

BLOCK_BYTES = 64 * 2**20
_TILE_ROWS = 128


@dataclass(frozen=True)
class Place:
    """Where a matrix stands in the dense, unsharded tensor that random masks are drawn for.

    Args:
        name: stock name of the dense tensor.
        shape: (M, N) of the dense tensor.
        rows: (m,) dense numbers of the rows that are here, ascending; None: all.
        columns: (n,) the same for columns.
    """

    name: str
    shape: tuple[int, int]
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def kept_shape(self) -> tuple[int, int]:
        """(m, n)."""
        m = self.shape[0] if self.rows is None else len(self.rows)
        n = self.shape[1] if self.columns is None else len(self.columns)
        return m, n


class Delta(ABC):
    """One tensor's delta.

    Args:
        place: where it stands in the dense tensor.
    """

    def __init__(self, place: Place):
        self.place = place

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.place.kept_shape

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """(stop - start, n) float32."""

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """(first row, block) from top to bottom, each at most ``block_bytes`` large (or one row)."""
        m, n = self.shape
        step = max(1, block_bytes // (4 * max(1, n)))
        return ((start, self.rows(start, min(start + step, m))) for start in range(0, m, step))

    def whole(self) -> Tensor:
        """(m, n) float32; for small tensors and tests."""
        return self.rows(0, self.shape[0])


class LowRank(Delta):
    """``scale * b @ a``: a LoRA adapter's delta.

    Args:
        place: where it stands. a: (r, n). b: (m, r). scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    def __init__(self, place: Place, a: Tensor, b: Tensor, scale: float):
        super().__init__(place)
        self.a, self.b, self.scale = a.float(), b.float(), scale

    def rows(self, start: int, stop: int) -> Tensor:
        # Always in the same tiles: a product of another shape rounds differently, and a method that looks at the delta
        # twice (for a threshold, then to cut) must see the same bits.
        tiles = range(start - start % _TILE_ROWS, stop, _TILE_ROWS)
        made = [self.b[tile : tile + _TILE_ROWS] @ self.a * self.scale for tile in tiles]
        if not made:
            return self.a.new_zeros(0, self.a.shape[1])
        skipped = start - tiles[0]
        return torch.cat(made)[skipped : skipped + stop - start]


class Difference(Delta):
    """``tuned - base``, subtracted in float32.

    Args:
        place: where it stands.
        tuned: (start, stop) -> rows of the tuned tensor. base: the same of the base's.
    """

    def __init__(self, place: Place, tuned: Callable[[int, int], Tensor], base: Callable[[int, int], Tensor]):
        super().__init__(place)
        self._tuned, self._base = tuned, base

    def rows(self, start: int, stop: int) -> Tensor:
        return self._tuned(start, stop).float() - self._base(start, stop).float()


class Mapped(Delta):
    """Another delta, changed block by block.

    Args:
        delta: the one underneath.
        change: (block, start, stop) -> block of the same shape.
    """

    def __init__(self, delta: Delta, change: Callable[[Tensor, int, int], Tensor]):
        super().__init__(delta.place)
        self._delta, self._change = delta, change

    def rows(self, start: int, stop: int) -> Tensor:
        return self._change(self._delta.rows(start, stop), start, stop)


def words_of(place: Place, seed: int, model: str, purpose: str, start: int, stop: int) -> Tensor:
    """(stop - start, n) int64 in [0, 2^32): random words of these rows, drawn in the dense tensor's coordinates.

    Args:
        place: whose rows. seed: of the masks. model: name of the adapter or model, so that masks are independent.
        purpose: what is drawn, e.g. ``dare``. start, stop: rows as they are here, in the pruned tensor if it is one.
    """
    words = torch.from_numpy(_drawn(place, (purpose, model), seed, start, stop).astype(np.int64))
    return words if place.columns is None else words[:, place.columns]


def stays_of(place: Place, seed: int, model: str, purpose: str, start: int, stop: int, keep: float) -> Tensor:
    """(stop - start, n) bool: ``words_of`` below ``threshold(keep)``, without the 64-bit words."""
    stays = torch.from_numpy(_drawn(place, (purpose, model), seed, start, stop) < threshold(keep))
    return stays if place.columns is None else stays[:, place.columns]


def _drawn(place: Place, names: tuple[str, str], seed: int, start: int, stop: int) -> np.ndarray:
    """(stop - start, N) uint32."""
    rows = list(range(start, stop)) if place.rows is None else place.rows[start:stop].tolist()
    drawn = [lattice(seed, *names, place.name, rows=run, columns=place.shape[1]) for run in _runs(rows)]
    return drawn[0] if len(drawn) == 1 else np.concatenate(drawn)


def _runs(rows: list[int]) -> list[slice]:
    """Neighbouring numbers together."""
    runs: list[slice] = []
    for row in rows:
        if runs and runs[-1].stop == row:
            runs[-1] = slice(runs[-1].start, row + 1)
        else:
            runs.append(slice(row, row + 1))
    return runs


def threshold(keep: float) -> int:
    """Words below this are kept. Of the probability to KEEP: rounded in 32 bits it is off by 2^-32 at most."""
    return round(keep * 2**32)


@torch.no_grad()
def alignment(delta: Delta, inputs: Tensor, energy: float) -> float:
    """How little the delta's outputs gain from adding up: R = sum_ij D_ij^2 E[x_j^2] / E|Dx|^2.

    1: the contributions of different inputs are incoherent; far below 1: inputs align with the delta, and random
    dropping hurts little. Dropping with probability p and dividing by 1 - p has the relative output error
    sqrt(R p / (1 - p)).

    Args:
        delta: the delta.
        inputs: (n,) mean square of each input channel.
        energy: mean of |Dx|^2 over the same tokens.
    """
    if energy <= 0:
        return 1.0
    if isinstance(delta, LowRank):
        # Through an r x r product; the delta itself is never made.
        gram = delta.b.double().T @ delta.b.double()
        a = delta.a.double() * delta.scale
        return float((gram * (a * inputs.double() @ a.T)).sum()) / energy
    return sum(float((block.double().square() @ inputs.double()).sum()) for _, block in delta.blocks()) / energy


@torch.no_grad()
def row_influence(delta: Delta, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """((m,) sum_j D_ij x_j, (m,) sum_j (D_ij x_j)^2), float64, for one vector of inputs.

    Args:
        delta: the delta. inputs: (n,) x.
    """
    x = inputs.double()
    if isinstance(delta, LowRank):
        a, b = delta.a.double() * delta.scale * x, delta.b.double()
        return b @ a.sum(1), ((b @ (a @ a.T)) * b).sum(1)
    parts = [block.double() * x for _, block in delta.blocks()]
    return torch.cat([part.sum(1) for part in parts]), torch.cat([part.square().sum(1) for part in parts])
