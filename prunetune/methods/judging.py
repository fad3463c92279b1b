"""What scores and allocations may ask of the whole model: what removing units does to its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

# loss: estimates of the loss that removing a unit costs. local: comparable within a site only. standard: already
# brought to one scale over all sites.
Measure = Literal["loss", "local", "standard"]

Kept = Mapping[str, Sequence[int]]


class Judge(Protocol):
    """Runs the model with units removed, on rows that no score has seen, unless there is only one."""

    def divergence(self, kept: Kept, share: float = 1.0, *, symmetric: bool = False) -> float:
        """How far the next-token distributions move, in nats, mean over tokens.

        Args:
            kept: site -> indices that stay; an absent site keeps all.
            share: of the rows that are used, for a cheap first look.
            symmetric: Jensen-Shannon divergence; else KL of the cut model from the dense one.
        """

    def block_change(self, kept: Kept) -> NDArray[np.float64]:
        """(layers,): 1 - mean cosine between each layer's input and output in the cut model."""
