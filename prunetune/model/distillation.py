"""KL divergence between two models' next-token distributions from hidden states, without tokens x vocabulary.

Shapes: T target tokens, D hidden, V vocabulary, N tokens of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunetune.model.last_layer import project
from prunetune.model.token_stats import BLOCK_BYTES


def token_divergence(
    head: nn.Linear,
    student_TD: Tensor,
    teacher_TD: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """temperature^2 * KL(teacher || student) of every token in nats, at logits divided by ``temperature``.

    The gradient reaches ``student_TD`` alone. It is found while the blocks of logits exist, so that none is kept.

    Args:
        head: the output projection, weight (V, D); frozen.
        student_TD: (T, D) final hidden states. teacher_TD: (T, D) of the teacher, before the same projection.
        temperature: above 1 it brings out the unlikely tokens (arXiv 1503.02531).
        softcap: logits become ``softcap * tanh(logits / softcap)`` before that, or None.
        block_bytes: one block of float32 logits; about five exist at once.

    Returns:
        (T,) float32.
    """
    return _Divergence.apply(student_TD, teacher_TD, head, temperature, softcap, block_bytes)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_TD: Tensor,
        teacher_TD: Tensor,
        head: nn.Linear,
        temperature: float,
        softcap: float | None,
        block_bytes: int,
    ) -> Tensor:
        rows = max(1, block_bytes // (4 * head.weight.shape[0]))
        found = torch.zeros(len(student_TD), device=student_TD.device)
        grad_TD = torch.empty_like(student_TD, dtype=torch.float32)
        for start in range(0, len(student_TD), rows):
            span = slice(start, start + rows)
            logits_NV = project(student_TD[span], head.weight, head.bias, softcap)
            logp_NV = torch.log_softmax(project(teacher_TD[span], head.weight, head.bias, softcap) / temperature, -1)
            logq_NV = torch.log_softmax(logits_NV / temperature, -1)
            p_NV = logp_NV.exp()
            found[span] = temperature**2 * (p_NV * (logp_NV - logq_NV)).sum(-1)
            to_logits_NV = logq_NV.exp_().sub_(p_NV).mul_(temperature)
            if softcap is not None:
                to_logits_NV *= 1 - (logits_NV / softcap).square()
            grad_TD[span] = to_logits_NV @ head.weight.float()
        ctx.save_for_backward(grad_TD)
        ctx.dtype = student_TD.dtype
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        [grad_TD] = ctx.saved_tensors
        return (grads[0][:, None] * grad_TD).to(ctx.dtype), None, None, None, None, None
