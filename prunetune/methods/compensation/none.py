"""No compensation."""

from __future__ import annotations

from torch import Tensor

from prunetune.methods.compensation import COMPENSATIONS, Compensation


@COMPENSATIONS.register("none")
class NoCompensation(Compensation):
    """The weights that stay are left as they are."""

    needs = cost = "nothing"

    def weight(self, weight: Tensor, kept: Tensor, moment: Tensor | None) -> Tensor:
        return weight.index_select(1, kept)
