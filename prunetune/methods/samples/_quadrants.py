"""The plane of error and uncertainty, cut into quadrants by one pair of quantiles for each axis. Legend: N rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The quantiles leave at least a fiftieth of the rows between them.
_WIDEST = 0.49


@dataclass(frozen=True)
class Quadrants:
    """Where each row lies, and the lines that say so.

    Args:
        names: (N,) str: ``Q1`` high error, high uncertainty; ``Q2`` high, low; ``Q3`` low, low; ``Q4`` low, high;
            ``middle`` between the lines.
        error: the lower and the upper line of the error axis.
        uncertainty: the lower and the upper line of the uncertainty axis.
    """

    names: np.ndarray
    error: tuple[float, float]
    uncertainty: tuple[float, float]

    @property
    def wanted(self) -> np.ndarray:
        """(N,) bool, rows in the second and the fourth quadrant."""
        return (self.names == "Q2") | (self.names == "Q4")


def find_quadrants(
    error: np.ndarray, uncertainty: np.ndarray, share: float, *, tolerance: float, steps: int, best: bool
) -> Quadrants:
    """Lines by bisection, so that the second and fourth quadrant together hold about ``share`` of the rows.

    Both axes are cut at the same pair of quantiles (a, 1 - a); a larger a keeps more.

    Args:
        error, uncertainty: (N,) finite, N >= 1.
        share: of the rows, in [0, 1]. Where the two axes rise together less can be reached, often much less.
        tolerance: stop when the share is met this closely.
        steps: most bisections.
        best: return the closest of all cuts that were tried, else the last one.
    """
    low, high = 0.0, _WIDEST
    found: Quadrants | None = None
    for _ in range(steps):
        quantile = (low + high) / 2
        tried = _cut(error, uncertainty, quantile)
        gap = tried.wanted.mean() - share
        if found is None or not best or abs(gap) < abs(found.wanted.mean() - share):
            found = tried
        if abs(gap) < tolerance:
            break
        low, high = (quantile, high) if gap < 0 else (low, quantile)
    assert found is not None, "at least one step"
    return found


def _cut(error: np.ndarray, uncertainty: np.ndarray, quantile: float) -> Quadrants:
    error_low, error_high = np.quantile(error, [quantile, 1 - quantile])
    uncertainty_low, uncertainty_high = np.quantile(uncertainty, [quantile, 1 - quantile])
    wrong, right = error > error_high, error <= error_low
    unsure, sure = uncertainty > uncertainty_high, uncertainty <= uncertainty_low
    names = np.select(
        [wrong & unsure, wrong & sure, right & sure, right & unsure], ["Q1", "Q2", "Q3", "Q4"], default="middle"
    ).astype(object)
    lines = (float(error_low), float(error_high)), (float(uncertainty_low), float(uncertainty_high))
    return Quadrants(names, *lines)
