"""How much a channel varies, times how much its consumer listens: what a constant cannot stand in for."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from prunetune.methods.options import MethodOptions
from prunetune.methods.scores import INNER, SCORES, LayerFacts, LayerScore, ScoreContext, consumer
from prunetune.model.units import Site, kind_size


class FluctuationOptions(MethodOptions):
    """Options of fluctuation."""

    metric: Literal["wifv", "ifv", "wifn"] = Field(
        "wifv", description="weighted input variance, variance alone, or weight times input norm"
    )


@SCORES.register("fluctuation")
class Fluctuation(LayerScore):
    """Variance of an input times the squared norm of its column (FLAP), standardised within each layer and kind.

    Groups and heads get the mean over their inputs. Three things differ from the published code on purpose: the
    variance is that of all tokens together (the code's running update uses a mean that it has already overwritten, and
    starts from zero); attention is not squared before averaging, since MLPs are not; groups have the sizes that grouped
    queries give them. All scores are moved by one number so that the least is 0, which changes no ranking.
    """

    Options = FluctuationOptions
    paper = "arXiv 2312.11983"
    needs = frozenset({"weights", "activations"})
    cost = "forward passes, one layer in memory"
    kinds = INNER
    measure = "standard"

    def __init__(self, context: ScoreContext, options: FluctuationOptions):
        super().__init__(context, options)
        self.options: FluctuationOptions = options

    def units(self, facts: LayerFacts, kind: str) -> Tensor:
        assert facts.statistics is not None
        role = consumer(self.context.arch, kind)
        inputs, weight = facts.statistics.inputs[role], facts.weights[role]
        raw_F = {
            "wifv": lambda: inputs.variance * weight.square().sum(0),
            "ifv": lambda: inputs.variance,
            "wifn": lambda: weight.abs().mean(0) * inputs.square.sqrt(),
        }[self.options.metric]()
        spread = raw_F.std()
        z_F = (raw_F - raw_F.mean()) / spread if spread > 0 else torch.zeros_like(raw_F)
        return z_F.reshape(kind_size(self.context.arch, kind), -1).mean(1)

    def score(self, site: Site) -> Tensor:
        least = min(float(found.min()) for found in self._found.values())
        return super().score(site) - least
