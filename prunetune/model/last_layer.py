"""The output layer: logits in float32, and the norm of a row's gradient on it without making that gradient.

For the mean cross-entropy over a row's n targets the gradient is G = sum_t d_t h_t^T with d_t = (p_t - onehot_t) / n,
so |G|^2 = sum_ts (d_t . d_s) (h_t . h_s): T x T inner products instead of a V x D matrix. The part p_t . p_s is summed
while the vocabulary goes by in strips, under the same running maximum as the log-sum-exp.
Shapes: N tokens of a block, C columns of a strip, T tokens of one row, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def project(hidden_ND: Tensor, weight_CD: Tensor, bias_C: Tensor | None, softcap: float | None) -> Tensor:
    """Float32 logits. Products of half-precision inputs are never rounded to half: that biases the sums."""
    if hidden_ND.device.type == "cuda" and hidden_ND.dtype == weight_CD.dtype != torch.float32:
        logits_NC = torch.mm(hidden_ND, weight_CD.t(), out_dtype=torch.float32)
    else:
        logits_NC = hidden_ND.float() @ weight_CD.float().t()
    if bias_C is not None:
        logits_NC += bias_C.float()
    return logits_NC if softcap is None else softcap * torch.tanh(logits_NC / softcap)


def add_overlaps(overlaps: list[Tensor], exp_NC: Tensor, rescale_N: Tensor) -> None:
    """Adds a strip's part of sum_v e_t e_s to each row's (T, T) matrix, where e = exp(logit - running maximum).

    Args:
        overlaps: one (T, T) float32 matrix a row, in the order of the tokens; changed in place.
        exp_NC: (N, C) the strip's e. rescale_N: (N,) what older sums are multiplied with.
    """
    start = 0
    for overlap_TT in overlaps:
        span = slice(start, start + len(overlap_TT))
        rescale_T, exp_TC = rescale_N[span], exp_NC[span]
        overlap_TT.mul_(rescale_T[:, None]).mul_(rescale_T).addmm_(exp_TC, exp_TC.T)
        start = span.stop


def gradient_norms(
    head: nn.Linear, hidden_ND: Tensor, target_N: Tensor, overlaps: list[Tensor], high_N: Tensor, sum_N: Tensor
) -> Tensor:
    """(R,) float32 norms of each row's gradient on the output layer's weight; 0 for a row without targets.

    Args:
        head: the output projection. hidden_ND: (N, D). target_N: (N,) int64.
        overlaps: what ``add_overlaps`` summed over the whole vocabulary.
        high_N: (N,) largest logit. sum_N: (N,) sum of exp(logit - high).
    """
    norms, start = [], 0
    for overlap_TT in overlaps:
        span = slice(start, start + len(overlap_TT))
        hidden_TD, target_T, start = hidden_ND[span], target_N[span], span.stop
        if not len(target_T):
            norms.append(torch.zeros((), device=hidden_ND.device))
            continue
        bias_T = None if head.bias is None else head.bias[target_T]
        logits_TT = project(hidden_TD, head.weight[target_T], bias_T, None)  # of every token's target, at every token
        log_total_T = high_N[span] + sum_N[span].log()
        crossed_TT = logits_TT.sub_(log_total_T[:, None]).exp_()
        # In float64, because what is left is a small difference of these terms; in place, because T may be large.
        total_T = sum_N[span].double()
        dots_TT = overlap_TT.double().div_(total_T[:, None]).div_(total_T)
        dots_TT.sub_(crossed_TT).sub_(crossed_TT.T).add_(target_T[:, None] == target_T)
        square = dots_TT.mul_(hidden_TD.float() @ hidden_TD.float().T).sum() / len(target_T) ** 2
        norms.append(square.clamp_min(0).sqrt().float())
    return torch.stack(norms)
