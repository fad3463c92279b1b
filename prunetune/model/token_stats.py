"""Per-token statistics of a causal model, from hidden states, without ever holding tokens x vocabulary.

Shapes: B batch, S sequence, D hidden, V vocabulary, T target tokens (those with a label), N tokens and C
columns of a block. Statistics only, no gradients: the training loss is TRL's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from prunetune.core.errors import UnsupportedModelError

IGNORED_LABEL = -100
# One block of float32 logits; large enough for full matrix-product speed, small beside any model.
BLOCK_BYTES = 64 * 2**20
_VOCAB_BLOCK = 16384


@dataclass(frozen=True)
class TokenStats:
    """What the model thought of each target token.

    Args:
        nll: negative log-likelihood in nats, float32; 0 where ``mask`` is false.
        entropy: of the next-token distribution in nats, float32; 0 where ``mask`` is false.
        top1: the target was the most likely token (a tie with an earlier token does not count).
        mask: the token has a label. All four have one shape: (T,) or (B, S-1).
    """

    nll: Tensor
    entropy: Tensor
    top1: Tensor
    mask: Tensor


@torch.no_grad()
def token_statistics(
    model: Any,
    input_ids_BS: Tensor,
    labels_BS: Tensor,
    attention_mask_BS: Tensor | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> TokenStats:
    """Statistics of every labelled token of a batch; labels are not shifted, -100 means no target.

    Args:
        model: a ``*ForCausalLM`` of transformers, or a PeftModel around one.
        input_ids_BS: (B, S) int64. labels_BS: (B, S) int64.
        attention_mask_BS: (B, S), or None for no padding.
        block_bytes: upper bound of the float32 logits that exist at once.

    Returns:
        Tensors of shape (B, S-1); column t is about token t+1.

    Raises:
        UnsupportedModelError: the output head carries an adapter or is quantised.

    Example:
        >>> stats = token_statistics(model, input_ids, labels)            # doctest: +SKIP
        >>> float(stats.nll.sum() / stats.mask.sum())                     # doctest: +SKIP
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    outputs = causal.base_model(input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False)
    labels = labels_BS[:, 1:].to(outputs.last_hidden_state.device)
    mask = labels != IGNORED_LABEL
    found = head_statistics(
        output_head(causal),
        outputs.last_hidden_state[:, :-1][mask],
        labels[mask],
        softcap=logit_softcap(causal.config),
        block_bytes=block_bytes,
    )
    nll, entropy, top1 = (
        torch.zeros(mask.shape, dtype=part.dtype, device=part.device).masked_scatter_(mask, part)
        for part in (found.nll, found.entropy, found.top1)
    )
    return TokenStats(nll, entropy, top1, mask)


@torch.no_grad()
def head_statistics(
    head: nn.Linear,
    hidden_TD: Tensor,
    target_T: Tensor,
    *,
    softcap: float | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> TokenStats:
    """Statistics of target tokens from the final hidden states, block by block, all sums in float32.

    Args:
        head: the output projection, weight (V, D).
        hidden_TD: (T, D) final hidden states, after the last norm. target_T: (T,) int64 next tokens.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2), or None.

    Returns:
        Tensors of shape (T,).
    """
    columns = min(_VOCAB_BLOCK, head.weight.shape[0])
    rows = max(1, block_bytes // (4 * columns))
    blocks = [
        _block_statistics(head, hidden_ND, target_N, softcap, columns)
        for hidden_ND, target_N in zip(hidden_TD.split(rows), target_T.split(rows), strict=True)
    ]
    nll, entropy, top1 = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return TokenStats(nll, entropy, top1, torch.ones_like(top1))


def output_head(causal: Any) -> nn.Linear:
    """The output projection, if its weight is all there is to it.

    Raises:
        UnsupportedModelError: it carries an adapter or is quantised, so its weight alone gives wrong logits.
    """
    head = causal.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise UnsupportedModelError(
            f"the output head is a {type(head).__name__}, whose weight alone does not give the logits; "
            "leave lm_head out of the adapter's targets and of the quantisation"
        )
    return head


def logit_softcap(config: Any) -> float | None:
    """The final logit softcapping of a config (Gemma 2), or None."""
    value = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return None if value is None else float(value)


def _block_statistics(
    head: nn.Linear, hidden_ND: Tensor, target_N: Tensor, softcap: float | None, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, entropy, top1) of N tokens, with a running log-sum-exp over blocks of the vocabulary."""
    weight, bias = head.weight, head.bias
    high_N = torch.full(target_N.shape, -torch.inf, device=hidden_ND.device)
    sum_N = torch.zeros_like(high_N)
    weighted_N = torch.zeros_like(high_N)  # sum of exp(logit - high) * logit, for the entropy
    target_logit_N = torch.zeros_like(high_N)
    best_N = torch.zeros_like(target_N)
    for start in range(0, weight.shape[0], columns):
        rows = slice(start, start + columns)
        logits_NC = _project(hidden_ND, weight[rows], None if bias is None else bias[rows], softcap)
        block_high_N, block_best_N = logits_NC.max(dim=-1)
        best_N = torch.where(block_high_N > high_N, block_best_N + start, best_N)
        here_N = (target_N >= start) & (target_N < start + logits_NC.shape[1])
        index_N = (target_N - start).clamp(0, logits_NC.shape[1] - 1)
        target_logit_N = torch.where(here_N, logits_NC.gather(1, index_N[:, None])[:, 0], target_logit_N)
        new_high_N = torch.maximum(high_N, block_high_N)
        rescale_N = torch.exp(high_N - new_high_N)
        exp_NC = torch.exp(logits_NC - new_high_N[:, None])
        sum_N = sum_N * rescale_N + exp_NC.sum(dim=-1)
        weighted_N = weighted_N * rescale_N + (exp_NC * logits_NC).sum(dim=-1)
        high_N = new_high_N
    log_total_N = high_N + sum_N.log()
    return log_total_N - target_logit_N, log_total_N - weighted_N / sum_N, best_N == target_N


def _project(hidden_ND: Tensor, weight_CD: Tensor, bias_C: Tensor | None, softcap: float | None) -> Tensor:
    """Float32 logits. Products of half-precision inputs are never rounded to half: that biases the sums."""
    if hidden_ND.device.type == "cuda" and hidden_ND.dtype == weight_CD.dtype != torch.float32:
        logits_NC = torch.mm(hidden_ND, weight_CD.t(), out_dtype=torch.float32)
    else:
        logits_NC = hidden_ND.float() @ weight_CD.float().t()
    if bias_C is not None:
        logits_NC += bias_C.float()
    return logits_NC if softcap is None else softcap * torch.tanh(logits_NC / softcap)
