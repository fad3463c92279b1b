"""Random dropping in which larger changes have better chances."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from prunetune.methods.deltas import DELTAS, DeltaContext, DeltaMethod, DropOptions, random_words
from prunetune.model.deltas import Delta, Mapped


class DellaOptions(DropOptions):
    """Options of della."""

    epsilon: float = Field(0.05, ge=0, lt=0.5, description="chances lie within 1 - drop plus or minus this")

    @model_validator(mode="after")
    def _chances(self) -> DellaOptions:
        keep = 1 - self.drop
        if 0 < self.drop < 1 and not (keep - self.epsilon > 0 and keep + self.epsilon < 1):
            raise ValueError(
                f"chances to stay of {keep:.0%} plus or minus {self.epsilon:.0%} leave (0%, 100%); lower epsilon"
            )
        return self


@DELTAS.register("della")
class Della(DeltaMethod):
    """Every entry stays with a chance that grows with its rank in its row, and is divided by that chance."""

    Options = DellaOptions
    paper = "arXiv 2406.11617"
    random = True

    def __init__(self, options: DellaOptions):
        super().__init__(options)
        self.options: DellaOptions = options

    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        keep, epsilon = 1 - self.options.drop, self.options.epsilon
        if keep == 1:
            return delta
        if keep == 0:
            return Mapped(delta, lambda block, start, stop: torch.zeros_like(block))

        def change(block: Tensor, start: int, stop: int) -> Tensor:
            n = block.shape[1]
            ranks: Any = torch.argsort(torch.argsort(block.abs(), dim=1, stable=True), dim=1).double()
            chance = keep - epsilon + 2 * epsilon * ranks / (n - 1) if n > 1 else torch.full_like(ranks, keep)
            words = random_words(delta.place, context, "della", start, stop)
            return torch.where(words < (chance * 2**32).round(), block / chance.float(), torch.zeros_like(block))

        return Mapped(delta, change)
