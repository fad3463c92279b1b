"""Random dropping whose survivors are divided by more than 1 - drop: less noise for a little bias."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, field_validator

from prunetune.core.errors import DataError
from prunetune.methods.deltas import DELTAS, DeltaContext, DeltaMethod, DropOptions, Search
from prunetune.methods.deltas.dare import divided, masked, masked_factors
from prunetune.model.deltas import Delta, LowRank, alignment, row_influence

# Where the paper's scan over q stops: when so many rows have passed their minimum.
_ROWS_PASSED = 0.8
_POINTS = 9


class DarexOptions(DropOptions):
    """Options of darex_q."""

    q: float | Literal["auto", "closed_form", "analytic", "search"] = Field(
        "auto",
        description="what survivors are divided by, from 1 - drop to 1: a number for all tensors; search: the best "
        "number on rows; closed_form: per tensor from second moments of inputs; auto: that, times a number searched on "
        "rows; analytic: the paper's rule per tensor",
    )
    multiplier: float = Field(1.0, ge=0, description="of the closed form's distance from 1 - drop; 0 is dare")
    eta: float | None = Field(None, gt=0, description="of the paper's rule; searched on rows if it is not given")

    @field_validator("q")
    @classmethod
    def _positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError("survivors are divided by it, so it must be above 0 and at most 1")
        return value


@DELTAS.register("darex_q", "darex")
class DarexQ(DeltaMethod):
    """As dare, but survivors are divided by q >= 1 - drop: searched, by the paper's rule, or in closed form.

    Closed form: E|D~x - Dx|^2 over masks and tokens is smallest at q = (1 - p) + p R, where R says how incoherent the
    contributions of the inputs are (``model.deltas.alignment``). The paper has no such form, but ``analytic_q``. It is
    one layer's error. In whole models a smaller q measured better (perhaps the noise of many layers averages out while
    what division shrinks adds up): ``auto`` searches how much of the distance to take.
    """

    Options = DarexOptions
    paper = "arXiv 2410.09344"
    random = drawn = True

    def __init__(self, options: DarexOptions):
        super().__init__(options)
        self.options: DarexOptions = options
        self.calibrated = options.q in ("auto", "closed_form", "analytic")
        keep = 1 - options.drop
        if not 0 < keep < 1:
            return
        if options.q == "auto":
            self.search = Search("multiplier", (0.0, 0.03, 0.1, 0.3, 1.0, 2.0), {"q": "closed_form"})
        elif options.q == "search":
            # The paper's points are evenly spaced; noise falls with the ratio of q to 1 - p, so these are.
            self.search = Search("q", tuple(keep ** (1 - i / (_POINTS - 1)) for i in range(_POINTS)))
        elif options.q == "analytic" and options.eta is None:
            self.search = Search("eta", (0.1, 0.25, 0.5, 1.0, 2.0))

    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        return divided(self.kept(delta, context), self.divisor(delta, context))

    def kept(self, delta: Delta, context: DeltaContext) -> Delta:
        return masked(delta, context, self.options.drop)

    def on_factors(self, delta: LowRank, context: DeltaContext) -> LowRank:
        return masked_factors(delta, context, self.options.drop, self.divisor(delta, context))

    def divisor(self, delta: Delta, context: DeltaContext) -> float:
        """q of this tensor, in [1 - drop, 1].

        Raises:
            DataError: the rule has no inputs to go by, or q was to be searched and was not.
        """
        keep, q = 1 - self.options.drop, self.options.q
        if q == "search":
            raise DataError("darex_q was to search q, which takes rows. Give --calibration, or set q to a number")
        if not isinstance(q, str):
            return min(max(q, keep), 1.0)
        if context.inputs is None or context.energy is None or context.means is None:
            raise DataError(
                f"darex_q finds q from the inputs of {delta.place.name}, and none were collected. Give --calibration "
                "with a file of rows, or set q to a number"
            )
        if q == "analytic":
            return analytic_q(delta, context.means, self.options.drop, self.options.eta or 0.5)
        spread = alignment(delta, context.inputs, context.energy)
        return min(keep + self.options.multiplier * self.options.drop * spread, 1.0)


def analytic_q(delta: Delta, means: torch.Tensor, drop: float, eta: float) -> float:
    """The paper's rule (algorithm 3): the q of every output row that minimises its bound, averaged over the rows.

    With c_ij = D_ij * mean x_j, row i minimises eta (1 - k/q) |sum_j c_ij| + eta^2 phi(p) sum_j c_ij^2 / (4 q^2), whose
    minimum is q = eta phi(p) sum c^2 / (2 k |sum c|); the paper scans for it. As its scan does, rows beyond the 80th
    percentile count as that.

    Args:
        delta: the delta. means: (n,) mean of each input channel. drop: p; k = 1 - p. eta: the rule's one parameter.
    """
    keep = 1 - drop
    if not 0 < keep < 1:
        return 1.0
    phi = 0.5 if drop == 0.5 else (1 - 2 * drop) / math.log(keep / drop)
    sums, squares = row_influence(delta, means)
    rows = (eta * phi * squares / (2 * keep * sums.abs()).clamp_min(1e-30)).clamp(keep, 1.0)
    return float(torch.minimum(rows, rows.quantile(_ROWS_PASSED)).mean().clamp(keep, 1.0))
