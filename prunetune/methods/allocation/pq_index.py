"""How few units hold a site's score: widths from it, and a warning when the budget asks for more."""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from prunetune.core.sizes import format_fraction
from prunetune.methods.allocation import ALLOCATIONS, Allocation, AllocationProblem, Counts, Vector, spread
from prunetune.methods.options import MethodOptions


class PqIndexOptions(MethodOptions):
    """Options of pq_index."""

    p: float = Field(0.5, gt=0, description="smaller norm")
    q: float = Field(1.0, gt=0, description="larger norm")
    slack: float = Field(0.0, ge=0, description="eta: the larger, the fewer must stay")
    speed: float = Field(1.0, gt=0, description="gamma: of what the bound lets go, this part goes")
    most: float = Field(0.9, gt=0, le=1, description="beta: no site loses more than this fraction")

    @model_validator(mode="after")
    def _ordered(self) -> PqIndexOptions:
        if self.p >= self.q:
            raise ValueError(f"p must be less than q; set now: p {self.p:g}, q {self.q:g}")
        return self


@ALLOCATIONS.register("pq_index")
class PqIndexAllocation(Allocation):
    """Widths in proportion to the bound that the PQ index of a site's scores gives; says when the budget is below it.

    I = 1 - n^(1/q - 1/p) |w|_p / |w|_q is 0 for equal scores and near 1 if few units hold all; at least
    n (1 + eta)^(-q/(q-p)) (1 - I)^(qp/(q-p)) units stay. The signal to stop is a budget below the sum of these bounds.
    """

    Options = PqIndexOptions
    paper = "arXiv 2302.05601"

    def __init__(self, options: PqIndexOptions):
        super().__init__(options)
        self.options: PqIndexOptions = options
        self._said: list[str] = []

    def counts(self, problem: AllocationProblem) -> Counts:
        stays = [place.size - self.removable(problem.scores[place.name]) for place in problem.places]
        advised = sum(place.cost * n for place, n in zip(problem.places, stays))
        total = sum(place.cost * place.size for place in problem.places)
        said = f"the PQ index of these scores advises to keep {format_fraction(advised / total)} of what may leave"
        beyond = ": stop earlier, or recover on the way" if advised > problem.budget else ""
        self._said = [f"{said}; the budget keeps {format_fraction(problem.fraction)}{beyond}"]
        return spread(problem, [n / place.size for place, n in zip(problem.places, stays)])

    def remarks(self) -> list[str]:
        return self._said

    def removable(self, scores: Vector) -> int:
        """Units of a site that the index lets go."""
        p, q, n = self.options.p, self.options.q, len(scores)
        exponent = q * p / (q - p)
        bound = n * (1 + self.options.slack) ** (-q / (q - p)) * (1 - pq_index(scores, p, q)) ** exponent
        # Equal scores have an index of 0 up to rounding, which must not cost a unit.
        return int(np.floor(n * min(self.options.speed * max(0.0, 1 - bound / n), self.options.most) + 1e-9))


def pq_index(scores: Vector, p: float, q: float) -> float:
    """In [0, 1): 0 for equal scores, near 1 if few hold all. Scores must be at least 0; all zeros count as equal."""
    values = np.asarray(scores, dtype=np.float64)
    largest = values.max(initial=0.0)
    if largest == 0.0:
        return 0.0
    values = values / largest
    norm_p, norm_q = (values**p).sum() ** (1 / p), (values**q).sum() ** (1 / q)
    return float(max(0.0, 1.0 - len(values) ** (1 / q - 1 / p) * norm_p / norm_q))
