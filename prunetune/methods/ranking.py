"""Ranking that noise cannot decide: scores rounded before they are compared, ties broken by names, not by order.

The same row scored in another batch differs in the last bits; sample and token methods both rank through here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_DIGITS = 5
_LARGEST = 308
# Powers of ten as the nearest doubles, from 1e-308 on: multiplying by a table is exact everywhere, `**` is not.
_POWERS = np.array([float(f"1e{exponent}") for exponent in range(-_LARGEST, _LARGEST + 1)])
_SMALLEST = 1e-290


def significant(scores: np.ndarray) -> np.ndarray:
    """(n,) float64, rounded to five significant digits; what is not finite becomes -inf, so that it ranks last."""
    scores = np.asarray(scores, dtype=np.float64)
    size = np.abs(scores)
    usable = np.isfinite(scores) & (size > _SMALLEST)
    safe = np.where(usable, size, 1.0)
    exponent = np.floor(np.log10(safe)).astype(np.int64)
    # The logarithm may be off by one beside a power of ten, and in another way on another machine.
    exponent -= safe < _power(exponent)
    exponent += safe >= _power(np.minimum(exponent + 1, _LARGEST))
    shift = exponent - (_DIGITS - 1)
    scale = _power(np.abs(shift))
    with np.errstate(over="ignore"):  # on the side that is not taken
        digits = np.rint(np.where(shift < 0, safe * scale, safe / scale))
        rounded = np.where(shift < 0, digits / scale, digits * scale)
    return np.where(usable, np.copysign(rounded, scores), np.where(np.isfinite(scores), 0.0, -np.inf))


def _power(exponent: np.ndarray) -> np.ndarray:
    return _POWERS[exponent + _LARGEST]


def best_first(scores: np.ndarray, *ties: np.ndarray) -> np.ndarray:
    """(n,) indices from the highest rounded score to the lowest.

    Args:
        scores: (n,) higher is better; what is not finite comes last.
        ties: (n,) keys that decide between equal scores, smaller first, the first key before the second.
    """
    return np.lexsort((*reversed(ties), -significant(scores)))


def name_ranks(names: Sequence[str]) -> np.ndarray:
    """(n,) place of each name in sorted order: a tie-break that does not depend on the order of the rows."""
    order = sorted(range(len(names)), key=names.__getitem__)
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[order] = np.arange(len(names))
    return ranks


def percentiles(values: np.ndarray) -> np.ndarray:
    """(n,) where each value stands among the finite ones, in (0, 1), equal values at the middle of their places.

    What is not finite has no place: NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    places = np.full(len(values), np.nan)
    if finite.any():
        _, inverse, counts = np.unique(significant(values[finite]), return_inverse=True, return_counts=True)
        places[finite] = ((np.cumsum(counts) - counts / 2) / counts.sum())[inverse]
    return places


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rho over the pairs that are finite; None where one side is constant or fewer than three pairs are."""
    both = np.isfinite(first) & np.isfinite(second)
    ranks = percentiles(np.asarray(first)[both]), percentiles(np.asarray(second)[both])
    if both.sum() < 3 or any(np.ptp(side) == 0 for side in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])
