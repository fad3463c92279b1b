"""Kept fractions by a softmax over the energies of sites."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from prunetune.methods.allocation import ALLOCATIONS, Allocation, AllocationProblem, Counts, spread
from prunetune.methods.options import MethodOptions


class SoftmaxOptions(MethodOptions):
    """Options of softmax."""

    temperature: float = Field(1.0, gt=0, description="high: uniform; low: all to the sites with the most energy")
    least: float = Field(0.1, ge=0, lt=1, description="no site keeps a smaller fraction, if the budget allows")


@ALLOCATIONS.register("softmax")
class Softmax(Allocation):
    """Kept fractions in proportion to softmax(energy / temperature), met by water filling (STRUPRUNE's rule).

    A site's energy is the sum of its scores over the mean of its kind. This is an implementable reading: only the
    summary of the paper's closed form was at hand.
    """

    Options = SoftmaxOptions
    paper = "arXiv 2510.03246"

    def __init__(self, options: SoftmaxOptions):
        super().__init__(options)
        self.options: SoftmaxOptions = options

    def counts(self, problem: AllocationProblem) -> Counts:
        sums = np.array([problem.scores[place.name].sum() for place in problem.places])
        weights = np.ones(len(sums))
        for kind in sorted({place.kind for place in problem.places}):
            of_kind = np.array([place.kind == kind for place in problem.places])
            mean = sums[of_kind].mean()
            energy = sums[of_kind] / mean / self.options.temperature if mean > 0 else np.zeros(of_kind.sum())
            softmax = np.exp(energy - energy.max())
            weights[of_kind] = softmax / softmax.mean()
        return spread(problem, weights.tolist(), least=min(self.options.least, problem.fraction))
