"""DONOD: what one row alone would do to the output layer."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from prunetune.core.errors import DataError
from prunetune.methods.options import MethodOptions
from prunetune.methods.samples import SAMPLES, SampleMethod
from prunetune.model.score_table import ScoreTable

Direction = Literal["min", "max"]


class DonodOptions(MethodOptions):
    """Options of donod."""

    eta: float = Field(1e-3, gt=0, description="learning rate of the imagined step of plain SGD")
    don_direction: Direction = Field("min", description="which delta of norm (signed) is better")
    nod_direction: Direction = Field("min", description="which norm of delta is better")
    weights: tuple[float, float] = Field((0.5, 0.5), description="of delta of norm and norm of delta, in proportion")

    @field_validator("weights")
    @classmethod
    def _usable(cls, weights: tuple[float, float]) -> tuple[float, float]:
        if min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError("weights must not be negative, and one must be above 0; the default is [0.5, 0.5]")
        return weights


@SAMPLES.register("donod")
class DonodSamples(SampleMethod):
    """Rows that move the output layer least, in norm and in place, joined by TOPSIS (DONOD).

    Of arXiv 2504.14810. With W the output layer, G the gradient of the row's mean loss and W' = W - eta G: delta of
    norm is |W'| - |W|, norm of delta is |W' - W|. No step is taken: both follow from <W, G>, |G| and |W|. The paper's
    full text was not at hand; plain SGD, both directions (smaller is better) and equal weights are our reading of its
    abstract, and are options.
    """

    Options = DonodOptions
    paper = "arXiv 2504.14810"
    needs = frozenset({"residual", "grad_norm"})
    options: DonodOptions

    def scores(self, table: ScoreTable) -> np.ndarray:
        don, nod = self.deltas(table)
        judged = (table.targets > 0) & np.isfinite(don) & np.isfinite(nod)
        closeness = np.full(len(table), np.nan)
        matrix_N2 = np.column_stack([don, nod])[judged]
        directions = (self.options.don_direction, self.options.nod_direction)
        closeness[judged] = topsis(matrix_N2, directions, self.options.weights)
        return closeness

    def deltas(self, table: ScoreTable) -> tuple[np.ndarray, np.ndarray]:
        """Delta of norm and norm of delta of every row, (N,) float64 each.

        Raises:
            DataError: the table does not say the norm of the output layer's weight.
        """
        if not math.isfinite(weight_norm := float(table.facts.get("weight_norm", math.nan))):
            raise DataError(
                "donod needs the norm of the output layer's weight (fact weight_norm), which these scores do not have. "
                "Score again with the option that adds last-layer gradients (prunetune data score --help)"
            )
        eta = self.options.eta
        inner = table.rows["residual"].astype(np.float64)
        norm = table.rows["grad_norm"].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            # |W'|^2 - |W|^2, over |W'| + |W|: subtracting the two norms would leave nothing but rounding.
            change = eta * (eta * norm**2 - 2 * inner)
            moved = np.sqrt(np.maximum(weight_norm**2 + change, 0.0))
            return change / (moved + weight_norm), eta * norm


def topsis(
    matrix_NK: np.ndarray, directions: tuple[Direction, ...], weights: tuple[float, ...] | None = None
) -> np.ndarray:
    """(N,) closeness to the ideal in [0, 1]; 1/2 where all rows are equal.

    Args:
        matrix_NK: (N, K) finite criteria.
        directions: for each criterion, whether its smallest or its largest value is the ideal.
        weights: of the criteria, in proportion; None: equal.
    """
    if not len(matrix_NK):
        return np.zeros(0)
    shares = np.asarray(weights or [1.0] * matrix_NK.shape[1], dtype=np.float64)
    # By its largest entry first, so that squares neither overflow nor vanish; fsum, so that the order does not count.
    largest_K = np.abs(matrix_NK).max(axis=0)
    scaled_NK = matrix_NK / np.where(largest_K > 0, largest_K, 1.0)
    norm_K = np.array([math.sqrt(math.fsum(column**2)) for column in scaled_NK.T])
    v_NK = shares / shares.sum() * scaled_NK / np.where(norm_K > 0, norm_K, 1.0)
    low_K, high_K = v_NK.min(axis=0), v_NK.max(axis=0)
    smaller_K = np.array([direction == "min" for direction in directions])
    to_best = np.linalg.norm(v_NK - np.where(smaller_K, low_K, high_K), axis=1)
    to_worst = np.linalg.norm(v_NK - np.where(smaller_K, high_K, low_K), axis=1)
    total = to_best + to_worst
    return np.where(total > 0, to_worst / np.where(total > 0, total, 1.0), 0.5)
