"""How much a layer turns its input."""

from __future__ import annotations

import torch
from torch import Tensor

from prunetune.methods.scores import SCORES, LayerFacts, LayerScore


@SCORES.register("block_influence")
class BlockInfluence(LayerScore):
    """1 - mean cosine between a layer's input and output (ShortGPT); whole layers leave."""

    paper = "arXiv 2403.03853"
    needs = frozenset({"activations"})
    cost = "forward passes, one layer in memory"
    kinds = ("layers",)

    def units(self, facts: LayerFacts, kind: str) -> Tensor:
        return torch.tensor([self.whole_layer(facts)])

    def whole_layer(self, facts: LayerFacts) -> float:
        assert facts.statistics is not None
        return max(0.0, 1.0 - facts.statistics.cosine)
