"""The changes that move outputs most are kept: magnitude times the size of the input."""

from __future__ import annotations

from prunetune.core.errors import DataError
from prunetune.methods.deltas import DELTAS, DeltaContext, DeltaMethod, DropOptions
from prunetune.methods.deltas._largest import largest_of_rows, share_of
from prunetune.model.deltas import Delta


@DELTAS.register("wanda")
class WandaDelta(DeltaMethod):
    """Of every row the entries with the largest |D_ij| * sqrt(E[x_j^2]) stay, unscaled."""

    Options = DropOptions
    paper = "arXiv 2410.09344"
    calibrated = True

    def __init__(self, options: DropOptions):
        super().__init__(options)
        self.options: DropOptions = options

    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        inputs = context.inputs
        if inputs is None:
            raise DataError(
                f"wanda weighs entries by the inputs of {delta.place.name}, and none were collected. Give "
                "--calibration with a file of rows, or take magnitude"
            )
        if self.options.drop == 0:
            return delta
        size = inputs.float().sqrt()
        return largest_of_rows(delta, share_of(delta.shape[1], 1 - self.options.drop), lambda block: block.abs() * size)
