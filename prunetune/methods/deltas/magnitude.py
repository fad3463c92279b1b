"""The largest changes are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from prunetune.core.errors import DataError
from prunetune.methods.deltas import DELTAS, DeltaContext, DeltaMethod, DropOptions
from prunetune.methods.deltas._largest import largest_of_rows, largest_of_tensor, share_of, shares
from prunetune.model.deltas import Delta


class MagnitudeOptions(DropOptions):
    """Options of magnitude."""

    scope: Literal["tensor", "row", "model"] = Field(
        "tensor", description="entries compete within a tensor, within a row, or within the whole model"
    )
    outliers: float = Field(0.0, ge=0, lt=1, description="fraction of the largest entries that is dropped first")


@DELTAS.register("magnitude")
class Magnitude(DeltaMethod):
    """The entries with the largest absolute values stay, unscaled; the trimming step of TIES, and of breadcrumbs.

    With ``outliers`` the very largest leave as well (model breadcrumbs, arXiv 2312.06795).
    """

    Options = MagnitudeOptions
    paper = "arXiv 2306.01708"

    def __init__(self, options: MagnitudeOptions):
        super().__init__(options)
        self.options: MagnitudeOptions = options
        self.ranks_all = options.scope == "model"

    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        m, n = delta.shape
        drop, outliers = self.options.drop, min(self.options.outliers, self.options.drop)
        if drop == 0:
            return delta
        if self.options.scope == "model":
            if context.ranks is None:
                raise DataError(f"magnitude ranks all tensors together, and {delta.place.name} was given alone")
            return largest_of_tensor(delta, context.ranks[1], skip=context.ranks[0])
        if self.options.scope == "tensor":
            return largest_of_tensor(delta, share_of(m * n, 1 - drop), skip=share_of(m * n, outliers))
        return largest_of_rows(delta, share_of(n, 1 - drop), lambda block: block.abs(), skip=share_of(n, outliers))

    def ranks_of(self, deltas: Mapping[str, Delta]) -> dict[str, tuple[int, int]]:
        total = sum(delta.shape[0] * delta.shape[1] for delta in deltas.values())
        skip = share_of(total, min(self.options.outliers, self.options.drop))
        leaving, ranked = shares(deltas, skip), shares(deltas, skip + share_of(total, 1 - self.options.drop))
        return {name: (leaving[name], ranked[name] - leaving[name]) for name in deltas}
