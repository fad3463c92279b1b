"""The directions that carry most of a delta's energy are kept."""

from __future__ import annotations

import torch
from pydantic import Field

from prunetune.methods.deltas import DELTAS, DeltaContext, DeltaMethod
from prunetune.methods.options import MethodOptions
from prunetune.model.deltas import Delta, LowRank


class RankOptions(MethodOptions):
    """Options of rank."""

    energy: float = Field(0.9, gt=0, le=1, description="share of the squared singular values that stays at least")
    rank: int | None = Field(None, ge=1, description="at most so many directions")
    drop: float | None = Field(
        None, ge=0, le=1, description="share of the directions that is dropped, instead of energy"
    )


@DELTAS.register("rank")
class Rank(DeltaMethod):
    """Truncated singular value decomposition; a LoRA product's comes from QR of its factors and an r x r core."""

    Options = RankOptions
    paper = "arXiv 2002.09018"

    def __init__(self, options: RankOptions):
        super().__init__(options)
        self.options: RankOptions = options

    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        if self.options.drop == 0:
            return delta
        return self._truncated(delta) or delta

    def on_factors(self, delta: LowRank, context: DeltaContext) -> LowRank:
        return delta if self.options.drop == 0 else self._truncated(delta) or delta

    def _truncated(self, delta: Delta) -> LowRank | None:
        """None if the delta is zero."""
        left, values, right = decompose(delta)
        energy = values.double().square().cumsum(0)
        if not len(values) or energy[-1] == 0:
            return None
        count = int(torch.searchsorted(energy, self.options.energy * energy[-1] * (1 - 1e-12))) + 1
        if self.options.drop is not None:
            count = round((1 - self.options.drop) * len(values))
        count = min(count, len(values), self.options.rank or len(values))
        root = values[:count].sqrt()
        return LowRank(delta.place, root[:, None] * right[:count], left[:, :count] * root, 1.0)


def decompose(delta: Delta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(m, k), (k,), (k, n): singular vectors and values of a delta, largest first."""
    if isinstance(delta, LowRank):
        q_left, r_left = torch.linalg.qr(delta.b.double())
        q_right, r_right = torch.linalg.qr(delta.a.double().T)
        left, values, right = torch.linalg.svd(r_left @ r_right.T * delta.scale)
        return (q_left @ left).float(), values.float(), (right @ q_right.T).float()
    left, values, right = torch.linalg.svd(delta.whole(), full_matrices=False)
    return left, values, right
