"""The range of a channel's input weights."""

from __future__ import annotations

from torch import Tensor

from prunetune.methods.scores import SCORES, LayerFacts, LayerScore


@SCORES.register("peak_to_peak")
class PeakToPeak(LayerScore):
    """max(w) + |min(w)| of a channel's gate row, plus that of its up row; no data.

    The criterion was called maximum absolute weight (MAW) first; it is a range. The consumer's weights do not count.
    """

    paper = "arXiv 2512.22671"
    kinds = ("mlp_channels",)

    def units(self, facts: LayerFacts, kind: str) -> Tensor:
        return self._range(facts.weights["gate"]) + self._range(facts.weights["up"])

    @staticmethod
    def _range(weight_FD: Tensor) -> Tensor:
        return weight_FD.amax(1) + weight_FD.amin(1).abs()
