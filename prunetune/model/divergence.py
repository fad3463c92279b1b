"""How far two models' answers are apart."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_kl(reference: Tensor, other: Tensor) -> float:
    """Mean over positions of KL(reference || other) in nats, from logits (..., V); NaN counts as infinite."""
    logp, logq = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = float((logp.exp() * (logp - logq)).sum(-1).mean())
    return max(0.0, kl) if kl == kl else torch.inf
