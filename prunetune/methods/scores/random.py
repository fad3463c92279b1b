"""The control that every other score must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from prunetune.core.streams import stream
from prunetune.methods.scores import SCORES, LayerFacts, LayerScore
from prunetune.model.units import LAYERS_SITE, kind_size, site_name


@SCORES.register("random")
class Random(LayerScore):
    """Units chosen by lot: the control that every other score must beat."""

    needs = frozenset[str]()
    cost = "nothing"
    measure = "standard"

    def units(self, facts: LayerFacts, kind: str) -> Tensor:
        return self._draw(site_name(facts.layer, kind), kind_size(self.context.arch, kind))

    def whole_layer(self, facts: LayerFacts) -> float:
        return float(self._draw(LAYERS_SITE, self.context.arch.layers)[facts.layer])

    def _draw(self, name: str, size: int) -> Tensor:
        return torch.from_numpy(stream(self.context.seed, "score.random", name).random(size)).float()
