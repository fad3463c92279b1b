"""One factor per input that stays, fitted and folded into the weight."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from prunetune.core.errors import PrunetuneError
from prunetune.methods.compensation import COMPENSATIONS, Compensation
from prunetune.methods.options import MethodOptions


class MaskTuningOptions(MethodOptions):
    """Options of mask_tuning."""

    tokens: int = Field(16384, ge=256, description="calibration tokens from the training rows")
    ridge: float = Field(0.01, gt=0, description="pull toward 1, of the mean diagonal of the normal equations")


@COMPENSATIONS.register("mask_tuning")
class MaskTuning(Compensation):
    """Scales each input that stays by the factor that best stands in for the ones that leave.

    Least squares for a diagonal m: with G = (W^T W) o C (elementwise), C the second moment of the dense inputs and S
    the ones that stay, (G[S, S] + r I) m = G[S, :] 1 + r 1. Fewer numbers are fitted than by refit, so it follows few
    calibration tokens less closely. The factors are folded into W[:, S].
    """

    Options = MaskTuningOptions
    paper = "arXiv 2501.15255, 2204.09656"

    def __init__(self, options: MaskTuningOptions):
        super().__init__(options)
        self.options: MaskTuningOptions = options
        self.tokens = options.tokens

    def weight(self, weight: Tensor, kept: Tensor, moment: Tensor | None) -> Tensor:
        assert moment is not None, "mask_tuning asks for tokens, so it is given a moment"
        if not bool(torch.isfinite(moment).all()):
            raise PrunetuneError(
                "mask_tuning: the activations that reach a linear are not finite, so the model has diverged. Lower "
                "train.learning_rate, or set compensation: none"
            )
        dense = weight.index_select(1, kept)
        normal_SF = (dense.T @ weight).double() * moment.index_select(0, kept).double()
        inner = normal_SF.index_select(1, kept)
        ridge = self.options.ridge * float(inner.diagonal().mean())
        if ridge <= 0.0:
            return dense  # nothing ever reaches this linear
        inner.diagonal().add_(ridge)
        factor, fault = torch.linalg.cholesky_ex(inner)
        if int(fault):
            raise PrunetuneError(
                "mask_tuning: a linear's normal equations are not positive definite to working precision. "
                "Set compensation.ridge higher, or compensation: none"
            )
        scale_S = torch.cholesky_solve(normal_SF.sum(1, keepdim=True) + ridge, factor)
        return dense * scale_S.squeeze(1).float()
