"""What the loss would change by, to first and second order, if a unit's weights were zero."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.options import MethodOptions
from prunetune.methods.scores import SCORES, ModelFacts, ModelScore, ScoreContext, owned
from prunetune.methods.scores._gradients import prunable_weights, row_loss
from prunetune.model.units import LAYERS_SITE

_SQUARED = ("second", "mixed")
_Matrices = dict[tuple[int, str], Tensor]


class TaylorOptions(MethodOptions):
    """Options of taylor."""

    order: Literal["first", "second", "mixed", "vector"] = Field(
        "mixed",
        description="|wg|; w^2 E g^2; |wg - w^2 E g^2 / 2|, each summed over elements; or |sum of wg| along each row "
        "or column",
    )


@SCORES.register("taylor")
class Taylor(ModelScore):
    """Change of the loss if a unit's weights were zero, element by element (LLM-Pruner), summed over what it owns.

    g is the gradient of the mean loss, E g^2 the mean over rows of squared row gradients (diagonal Fisher information
    for the Hessian). Units are deleted; the published code's folding of what leaves into similar rows is not done.
    """

    Options = TaylorOptions
    paper = "arXiv 2305.11627"
    needs = frozenset({"weights", "gradients"})
    cost = "loads the whole model, forward and backward; 2 to 3 times the weights' memory in float32"
    measure = "loss"

    def __init__(self, context: ScoreContext, options: TaylorOptions):
        super().__init__(context, options)
        self.options: TaylorOptions = options

    def collect(self, facts: ModelFacts) -> None:
        arch, order = self.context.arch, self.options.order
        weights = prunable_weights(facts.model, arch)
        rows = [row for row in facts.rows(0) if row.targets]
        total = sum(row.targets for row in rows)
        first = {key: torch.zeros_like(w, dtype=torch.float32) for key, w in weights.items() if order != "second"}
        square = {key: torch.zeros_like(w, dtype=torch.float32) for key, w in weights.items() if order in _SQUARED}
        for weight in weights.values():
            weight.requires_grad_(True)
        for row in rows:
            row_loss(facts.model, row).backward()
            for key, weight in weights.items():
                assert weight.grad is not None
                gradient = weight.grad.float()
                if key in first:
                    first[key].add_(gradient, alpha=row.targets / total)
                if key in square:
                    square[key].addcmul_(gradient, gradient, value=1.0 / len(rows))
                weight.grad = None
        for weight in weights.values():
            weight.requires_grad_(False)
        for layer in range(arch.layers):
            self._score_layer(layer, weights, first, square)

    def _score_layer(self, layer: int, weights: _Matrices, first: _Matrices, square: _Matrices) -> None:
        arch = self.context.arch

        def elements(role: str) -> Tensor:
            key = layer, role
            weight, order = weights[key].detach().float(), self.options.order
            if order == "second":
                return weight.square() * square[key]
            product = weight * first[key]
            if order == "vector":
                return product
            return (product - 0.5 * weight.square() * square[key] if order == "mixed" else product).abs()

        def units(kind: str) -> Tensor:
            return owned(arch, kind, elements, lines=torch.abs if self.options.order == "vector" else None)

        for site in self.context.sites:
            if site.layer == layer:
                self._found[site.name] = units(site.kind)
            elif site.kind == LAYERS_SITE:
                values = self._found.setdefault(site.name, torch.zeros(arch.layers))
                values[layer] = float(units("kv_groups").sum() + units("mlp_channels").sum())
