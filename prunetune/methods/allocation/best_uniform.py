"""Every legal uniform shape is tried."""

from __future__ import annotations

from prunetune.methods.allocation import ALLOCATIONS, Allocation, AllocationProblem, Counts


@ALLOCATIONS.register("best_uniform")
class BestUniform(Allocation):
    """Every legal uniform shape inside the budget is cut by the scores, and the one nearest to the dense output taken.

    There are few of them (one for each number of KV groups or heads), and nothing is lost in a projection.
    """

    needs_model = True
    needs = "scores, the model's output"
    cost = "loads the whole model; one forward pass of the rows kept for judging per legal shape"

    def counts(self, problem: AllocationProblem) -> Counts:
        assert problem.judge is not None
        marks = [problem.judge.divergence(problem.kept(shape)) for shape in problem.uniform]
        return dict(problem.uniform[marks.index(min(marks))])
