"""Greedy removal of whole layers by what it does to the model's output."""

from __future__ import annotations

import torch
from pydantic import Field

from prunetune.methods.options import MethodOptions
from prunetune.methods.scores import SCORES, ModelFacts, ModelScore, ScoreContext
from prunetune.model.units import LAYERS_SITE


class OutputDivergenceOptions(MethodOptions):
    """Options of output_divergence."""

    depth: float = Field(0.5, gt=0, le=1, description="share of the layers whose order is found one by one")


@SCORES.register("output_divergence")
class OutputDivergence(ModelScore):
    """Greedy (FinerCut): again and again the layer goes whose absence moves the output distribution least.

    The score is the place in that order. FinerCut removes attention and MLP sublayers singly; stock configs cannot say
    a layer without one of them, so whole layers leave. Layers beyond ``depth`` are ordered by their last divergence.
    """

    Options = OutputDivergenceOptions
    paper = "arXiv 2405.18218"
    needs = frozenset({"activations"})
    cost = "loads the whole model; about depth * layers^2 forward passes of the rows kept for judging"
    kinds = ("layers",)
    measure = "standard"

    def __init__(self, context: ScoreContext, options: OutputDivergenceOptions):
        super().__init__(context, options)
        self.options: OutputDivergenceOptions = options

    def collect(self, facts: ModelFacts) -> None:
        judge, layers = facts.judge(), self.context.arch.layers
        left, order = list(range(layers)), list[int]()
        changes: dict[int, float] = {}
        while len(left) > 1 and len(order) < self.options.depth * layers:
            changes = {
                layer: judge.divergence({LAYERS_SITE: [other for other in left if other != layer]}, symmetric=True)
                for layer in left
            }
            # Among equals the higher index goes, so that the lower stays.
            gone = min(left, key=lambda layer: (changes[layer], -layer))
            left.remove(gone)
            order.append(gone)
        order += sorted(left, key=lambda layer: (changes.get(layer, 0.0), -layer))
        scores = torch.zeros(layers)
        scores[order] = torch.arange(layers, dtype=torch.float32)
        self._found[LAYERS_SITE] = scores
