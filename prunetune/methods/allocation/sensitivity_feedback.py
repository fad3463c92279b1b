"""Many small steps; after each the model that is left says which layers to spare in the next."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from rich.progress import track

from prunetune.core.console import console
from prunetune.methods.allocation import ALLOCATIONS, Allocation, AllocationProblem, Counts, rounded, spread
from prunetune.methods.options import MethodOptions
from prunetune.model.units import parse_site


class SensitivityFeedbackOptions(MethodOptions):
    """Options of sensitivity_feedback."""

    steps: int = Field(10, ge=1, description="the paper's scripts take 50")
    amplitude: float = Field(0.02, ge=0, description="how much the most important layer is spared, a step")


@ALLOCATIONS.register("sensitivity_feedback")
class SensitivityFeedback(Allocation):
    """Removed fractions grow step by step, less where a layer turns its input more (Adapt-Pruner).

    Per step and layer: removed + step - amplitude * n, n the layer's 1 - cosine between input and output in the model
    cut so far, centred and scaled to [-1, 1]. Attention and MLP of a layer share its fraction. No training in between.
    """

    Options = SensitivityFeedbackOptions
    paper = "arXiv 2502.03460"
    needs_model = True
    needs = "scores, the model's output"
    cost = "loads the whole model; one forward pass of the rows kept for judging a step"

    def __init__(self, options: SensitivityFeedbackOptions):
        super().__init__(options)
        self.options: SensitivityFeedbackOptions = options

    def counts(self, problem: AllocationProblem) -> Counts:
        assert problem.judge is not None
        layers = [parse_site(place.name)[0] for place in problem.places]
        if -1 in layers:
            # Whole layers are one site: there is nothing to spread.
            return rounded(problem, {place.name: problem.fraction * place.size for place in problem.places})
        removed = np.zeros(max(layers) + 1)
        counts = {place.name: place.size for place in problem.places}
        for _ in track(range(self.options.steps), "removing step by step", console=console(), transient=True):
            change = problem.judge.block_change(problem.kept(counts))
            centred = change - change.mean()
            largest = np.abs(centred).max()
            importance = centred / largest if largest > 0 else centred
            step = (1.0 - problem.fraction) / self.options.steps
            removed = np.clip(removed + step - self.options.amplitude * importance, 0.0, 0.99)
            counts = self._nearest(problem, removed[layers])
        return spread(problem, (1.0 - removed[layers]).tolist())

    @staticmethod
    def _nearest(problem: AllocationProblem, removed: np.ndarray) -> Counts:
        """The legal counts nearest to these fractions; no budget on the way."""
        return {
            place.name: min(place.choices, key=lambda n: (abs(n - (1.0 - share) * place.size), -n))
            for place, share in zip(problem.places, removed)
        }
