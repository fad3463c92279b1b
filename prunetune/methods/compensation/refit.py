"""Ridge least squares: the inputs that stay reproduce what all inputs produced together."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from prunetune.core.errors import PrunetuneError
from prunetune.methods.compensation import COMPENSATIONS, Compensation
from prunetune.methods.options import MethodOptions

_BLOCK = 512


class RefitOptions(MethodOptions):
    """Options of refit."""

    tokens: int = Field(16384, ge=256, description="calibration tokens from the training rows")
    ridge: float = Field(0.1, gt=0, description="of the mean diagonal of the second moment")


@COMPENSATIONS.register("refit")
class Refit(Compensation):
    """Ridge least squares of the consumer on the inputs that stay: (W C[:, S] + r W[:, S]) (C[S, S] + r I)^-1.

    C is the second moment of the dense inputs, S the ones that stay, r the ridge; the same normal equations as in
    arXiv 2503.09657. The solution minimises the squared change of the linear's output on the calibration tokens.
    """

    Options = RefitOptions
    paper = "arXiv 2503.09657"

    def __init__(self, options: RefitOptions):
        super().__init__(options)
        self.options: RefitOptions = options
        self.tokens = options.tokens

    def weight(self, weight: Tensor, kept: Tensor, moment: Tensor | None) -> Tensor:
        assert moment is not None, "refit asks for tokens, so it is given a moment"
        if not bool(torch.isfinite(moment).all()):
            raise PrunetuneError(
                "refit: the activations that reach a linear are not finite, so the model has diverged. Lower "
                "train.learning_rate, or set compensation: none"
            )
        dense = weight.index_select(1, kept)
        ridge = self.options.ridge * float(moment.diagonal().double().mean())
        if ridge == 0.0:
            return dense  # nothing ever reaches this linear
        # As few float64 copies as can be, because one of the moment is larger than a layer of a wide model.
        inner = moment[kept[:, None], kept].double()
        inner.diagonal().add_(ridge)
        factor, fault = torch.linalg.cholesky_ex(inner, out=(inner, inner.new_empty((), dtype=torch.int32)))
        if int(fault):
            raise PrunetuneError(
                "refit: the second moment of a linear's inputs is not positive definite to working precision. Set "
                "compensation.ridge higher, or compensation: none"
            )
        # The ridge pulls toward the weights that stay as they are, not toward zero: with no data nothing changes.
        for rows, stay in zip(weight.split(_BLOCK), dense.split(_BLOCK)):
            double = rows.double()
            blocks = [double @ moment.index_select(1, part).double() for part in kept.split(_BLOCK)]
            right = torch.cat(blocks, dim=1) + ridge * stay
            stay.copy_(torch.cholesky_solve(right.T, factor).T)
        return dense
