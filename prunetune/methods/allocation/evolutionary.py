"""Paired shifts between sites, kept if the output moves less."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from rich.progress import track

from prunetune.core.console import console
from prunetune.core.streams import stream
from prunetune.methods.allocation import ALLOCATIONS, Allocation, AllocationProblem, Counts, Place
from prunetune.methods.allocation.global_threshold import GlobalThreshold
from prunetune.methods.options import MethodOptions

# Shares of the rows for judging that offspring are compared on, and how many go on from each comparison.
STAGES = ((0.125, 4), (0.5, 2), (1.0, 1))


class EvolutionaryOptions(MethodOptions):
    """Options of evolutionary."""

    generations: int = Field(10, ge=0, description="the paper takes 50")
    offspring: int = Field(16, ge=1, description="tried a generation; the paper takes 128")
    level: float = Field(0.125, gt=0, le=1, description="share of a site that one shift moves")
    shifts: int = Field(4, ge=1, description="a child differs by at most so many paired shifts")


@ALLOCATIONS.register("evolutionary")
class Evolutionary(Allocation):
    """Evolution by paired shifts (Tyr): one site gets narrower and another of its kind wider by as much.

    Starts from the global threshold; children are compared with the dense model's output on more and more rows, and the
    parent stays unless a child is nearer. A shift keeps what each kind has in all, so the uniform shape in the end
    is the start's: what is found shows in the widths that were wanted, and in a model class that can say them.
    """

    Options = EvolutionaryOptions
    paper = "arXiv 2503.09657"
    needs_model = True
    needs = "scores, the model's output"
    cost = "loads the whole model; generations * offspring * about 0.4 forward passes of the rows kept for judging"

    def __init__(self, options: EvolutionaryOptions):
        super().__init__(options)
        self.options: EvolutionaryOptions = options
        self._divergence: tuple[float, float] | None = None

    def counts(self, problem: AllocationProblem) -> Counts:
        assert problem.judge is not None
        parent = GlobalThreshold(MethodOptions()).counts(problem)
        start = best = problem.judge.divergence(problem.kept(parent))
        for generation in track(range(self.options.generations), "evolving", console=console(), transient=True):
            draw = stream(problem.seed, "allocation.evolutionary", generation)
            children = [self._child(problem, parent, draw) for _ in range(self.options.offspring)]
            for share, survivors in STAGES:
                marks = [problem.judge.divergence(problem.kept(child), share) for child in children]
                order = sorted(range(len(children)), key=lambda index: (marks[index], index))[:survivors]
                children, marks = [children[index] for index in order], [marks[index] for index in order]
            if marks[0] < best:
                parent, best = children[0], marks[0]
        self._divergence = start, best
        return parent

    def remarks(self) -> list[str]:
        if self._divergence is None:
            return []
        start, best = self._divergence
        return [f"evolution took the divergence of the wanted widths from {start:.4g} to {best:.4g} nats a token"]

    def _child(self, problem: AllocationProblem, parent: Counts, draw: np.random.Generator) -> Counts:
        child = dict(parent)
        for _ in range(int(min(draw.integers(1, self.options.shifts + 1, size=2)))):
            place = problem.places[int(draw.integers(len(problem.places)))]
            others = [other for other in problem.places if other.kind == place.kind and other is not place]
            if not others:
                continue
            other = others[int(draw.integers(len(others)))]
            moved = {**child, place.name: self._moved(place, child, -1), other.name: self._moved(other, child, 1)}
            fewer, more = child[place.name] - moved[place.name], moved[other.name] - child[other.name]
            if fewer and fewer == more:
                child = moved
        return child

    def _moved(self, place: Place, counts: Counts, direction: int) -> int:
        """The site's count one level down or up; unchanged where there is none."""
        level = max(1, round(self.options.level * len(place.choices)))
        spot = place.choices.index(counts[place.name]) + direction * level
        return place.choices[spot] if 0 <= spot < len(place.choices) else counts[place.name]
