"""The mean of what leaves, as a bias."""

from __future__ import annotations

import torch
from torch import Tensor

from prunetune.methods.compensation import COMPENSATIONS, Compensation


@COMPENSATIONS.register("bias")
class BiasCompensation(Compensation):
    """Adds what the removed inputs contributed on average to the linear's bias (FLAP): b + W[:, P] mean[P].

    Of all changes of the bias alone it is the least squares one. Only in `prunetune prune`, and only where the model's
    config can say a bias there; weights stay as they are.
    """

    paper = "arXiv 2312.11983"
    needs = "means of the linears' inputs"
    cost = "forward passes"
    makes_bias = True

    def weight(self, weight: Tensor, kept: Tensor, moment: Tensor | None) -> Tensor:
        return weight.index_select(1, kept)

    def bias(self, weight: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
        leaves = torch.ones_like(mean)
        leaves[kept] = 0.0
        return weight @ (mean * leaves)
