"""Random dropping whose survivors are divided by more than 1 - drop: less noise for a little bias."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prunetune.core.errors import DataError
from prunetune.methods.deltas import DELTAS, DeltaContext, DeltaMethod, DropOptions
from prunetune.methods.deltas.dare import divided, masked
from prunetune.model.deltas import Delta, alignment


class DarexOptions(DropOptions):
    """Options of darex_q."""

    q: float | Literal["closed_form"] = Field(
        "closed_form",
        description="what survivors are divided by, from 1 - drop to 1: a number for all tensors, or closed_form: per "
        "tensor from second moments of its inputs",
    )
    multiplier: float = Field(1.0, ge=0, description="of the closed form's distance from 1 - drop; 0 is dare")


@DELTAS.register("darex_q")
class DarexQ(DeltaMethod):
    """As dare, but survivors are divided by q >= 1 - drop; q from the paper's search, or in closed form.

    Closed form: E|D~x - Dx|^2 over masks and tokens is smallest at q = (1 - p) + p R, where R says how incoherent the
    contributions of the inputs are (``model.deltas.alignment``).
    """

    Options = DarexOptions
    paper = "arXiv 2410.09344"

    def __init__(self, options: DarexOptions):
        super().__init__(options)
        self.options: DarexOptions = options
        self.calibrated = options.q == "closed_form"

    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        return divided(masked(delta, context, self.options.drop), self.divisor(delta, context))

    def divisor(self, delta: Delta, context: DeltaContext) -> float:
        """q of this tensor, in [1 - drop, 1].

        Raises:
            DataError: the closed form has no second moments to go by.
        """
        keep = 1 - self.options.drop
        if self.options.q != "closed_form":
            return min(max(self.options.q, keep), 1.0)
        if context.inputs is None or context.energy is None:
            raise DataError(
                f"darex_q finds q from the inputs of {delta.place.name}, and none were collected. Give --calibration "
                "with a file of rows, or set q to a number"
            )
        spread = alignment(delta, context.inputs, context.energy)
        return min(keep + self.options.multiplier * self.options.drop * spread, 1.0)
