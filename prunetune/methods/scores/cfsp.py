"""Coarse to fine: how much a layer turns its input, times how much of it a channel carries."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.options import MethodOptions
from prunetune.methods.scores import SCORES, LayerFacts, LayerScore, ScoreContext
from prunetune.model.units import Site


class CfspOptions(MethodOptions):
    """Options of cfsp."""

    sharpness: float = Field(1.0, ge=0, description="of the weights between layers; 0: all layers alike")


@SCORES.register("cfsp")
class Cfsp(LayerScore):
    """A channel's share of its layer's weights and activations, times the layer's importance.

    Fine: with n the root mean square of each input of the down projection, the mean over rows of
    (|W_down| n / row sum + |W_up| / row sum + |W_gate| / row sum), times n. The published code divides by column
    sums; the mean over rows of that is the same number for every channel, so only n was left of it. Coarse: the
    angle between a layer's input and output, standardised over layers, through a sigmoid.
    """

    Options = CfspOptions
    paper = "arXiv 2409.13199"
    needs = frozenset({"weights", "activations"})
    cost = "forward passes, one layer in memory"
    kinds = ("mlp_channels",)
    measure = "standard"

    def __init__(self, context: ScoreContext, options: CfspOptions):
        super().__init__(context, options)
        self.options: CfspOptions = options
        self._angles: dict[int, float] = {}

    def units(self, facts: LayerFacts, kind: str) -> Tensor:
        assert facts.statistics is not None
        self._angles[facts.layer] = facts.statistics.angle
        norm_F = facts.statistics.inputs["down"].square.sqrt()
        shares_F = self._share(facts.weights["down"].abs() * norm_F)
        shares_F = shares_F + self._share(facts.weights["up"].abs().T) + self._share(facts.weights["gate"].abs().T)
        score_F = shares_F * norm_F
        return score_F / score_F.mean().clamp(min=torch.finfo(torch.float32).tiny)

    @staticmethod
    def _share(elements_DF: Tensor) -> Tensor:
        """(F,): mean over rows of each channel's share of the row."""
        sums_D = elements_DF.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (elements_DF / sums_D).mean(0)

    def score(self, site: Site) -> Tensor:
        angles = torch.tensor([self._angles[layer] for layer in sorted(self._angles)], dtype=torch.float64)
        spread = angles.std(correction=0)
        standard = (angles - angles.mean()) / spread if spread > 0 else torch.zeros_like(angles)
        weights = torch.sigmoid(self.options.sharpness * standard)
        place = sorted(self._angles).index(site.layer)
        return super().score(site) * float(weights[place] / weights.mean())
