"""The largest changes are kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prunetune.methods.deltas import DELTAS, DeltaContext, DeltaMethod, DropOptions
from prunetune.methods.deltas._largest import largest_of_rows, largest_of_tensor
from prunetune.model.deltas import Delta


class MagnitudeOptions(DropOptions):
    """Options of magnitude."""

    scope: Literal["tensor", "row"] = Field("tensor", description="entries compete within a tensor, or within a row")
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

    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        m, n = delta.shape
        drop, outliers = self.options.drop, min(self.options.outliers, self.options.drop)
        if drop == 0:
            return delta
        if self.options.scope == "tensor":
            return largest_of_tensor(delta, round((1 - drop) * m * n), skip=round(outliers * m * n))
        return largest_of_rows(delta, round((1 - drop) * n), lambda block: block.abs(), skip=round(outliers * n))
