"""How several deltas become one: sums, or sums over the models that agree on a sign.

Legend: b x n a block of rows of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class How:
    """A named way of merging.

    Args:
        delta: the delta method that prunes each model first. options: its options, unless the user says otherwise.
        consensus: only models that agree with the sign of the weighted sum count (TIES).
        normalise: divide by the weights that counted.
        paper: where it is from.
    """

    delta: str
    consensus: bool
    normalise: bool
    paper: str = ""
    options: dict[str, Any] = field(default_factory=dict)


HOWS = {
    "linear": How("identity", False, False, "arXiv 2212.04089"),
    "average": How("identity", False, True, "arXiv 2203.05482"),
    "ties": How("magnitude", True, True, "arXiv 2306.01708", {"drop": 0.8}),
    "dare_linear": How("dare", False, False, "arXiv 2311.03099", {"drop": 0.5}),
    "dare_ties": How("dare", True, False, "arXiv 2311.03099", {"drop": 0.5}),
    "della": How("della", True, True, "arXiv 2406.11617", {"drop": 0.5}),
    "della_linear": How("della", False, False, "arXiv 2406.11617", {"drop": 0.5}),
    "breadcrumbs": How("magnitude", False, False, "arXiv 2312.06795", {"drop": 0.8, "outliers": 0.01}),
    "breadcrumbs_ties": How("magnitude", True, False, "arXiv 2312.06795", {"drop": 0.8, "outliers": 0.01}),
}


def combine(blocks: Sequence[Tensor], weights: Sequence[float], *, consensus: bool, normalise: bool) -> Tensor:
    """(b, n) float32: the weighted sum of the models' blocks.

    Args:
        blocks: (b, n) float32, one a model. weights: one a model.
        consensus: leave out entries whose sign differs from the weighted sum's (0 counts as +), as TIES elects it.
        normalise: divide by the sum of the weights that counted at each entry; where that is 0, by 1.
    """
    weighted = torch.stack([block * weight for block, weight in zip(blocks, weights, strict=True)])
    if not consensus:
        total = weighted.sum(0)
        return total / _or_one(torch.tensor(float(sum(weights)))) if normalise else total
    positive = weighted.sum(0) >= 0
    agrees = torch.where(positive, weighted > 0, weighted < 0)
    total = (weighted * agrees).sum(0)
    if not normalise:
        return total
    counted = (torch.tensor(weights, dtype=torch.float32)[:, None, None] * agrees).sum(0)
    return total / _or_one(counted)


def _or_one(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)
