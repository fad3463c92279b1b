"""Per-token statistics of a causal model, from hidden states, without ever holding tokens x vocabulary.

Shapes: B batch, S sequence, D hidden, V vocabulary, T target tokens (those with a label), R rows, N tokens and C
columns of a block. Statistics only, no gradients: the training loss is TRL's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from prunetune.core.errors import UnsupportedModelError
from prunetune.model.last_layer import add_overlaps, gradient_norms, project
from prunetune.model.token_rows import IGNORED_LABEL

# One block of float32 logits; large enough for full matrix-product speed, and small enough that the C library hands the
# same memory out again instead of asking the system for fresh pages.
BLOCK_BYTES = 24 * 2**20
_VOCAB_BLOCK = 16384


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode for the block; every module then gets back the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class TokenStats:
    """What the model thought of each target token.

    Args:
        nll: negative log-likelihood in nats, float32; 0 where ``mask`` is false.
        entropy: of the next-token distribution in nats, float32; 0 where ``mask`` is false.
        top1: no token was more likely than the target.
        mask: the token has a label.
        el2n: norm of (predicted distribution - one-hot target), float32 (arXiv 2107.07075); 0 where ``mask`` is false.
        residual: expected logit minus the target's logit, float32: the inner product of the output layer's weight
            with its gradient, as far as this token goes; 0 where ``mask`` is false. All of these have one shape,
            (T,) or (B, S-1).
        grad_norm: (R,) float32 norm of each row's gradient with respect to the output layer's weight, for the mean
            loss over its targets; None unless rows were given.
    """

    nll: Tensor
    entropy: Tensor
    top1: Tensor
    mask: Tensor
    el2n: Tensor
    residual: Tensor
    grad_norm: Tensor | None = None


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
    causal, hidden_BSD = hidden_states(model, input_ids_BS, attention_mask_BS)
    labels = labels_BS[:, 1:].to(hidden_BSD.device)
    mask = labels != IGNORED_LABEL
    found = head_statistics(
        output_head(causal),
        hidden_BSD[:, :-1][mask],
        labels[mask],
        softcap=logit_softcap(causal.config),
        block_bytes=block_bytes,
    )
    nll, entropy, top1, el2n, residual = (
        torch.zeros(mask.shape, dtype=part.dtype, device=part.device).masked_scatter_(mask, part)
        for part in (found.nll, found.entropy, found.top1, found.el2n, found.residual)
    )
    return TokenStats(nll, entropy, top1, mask, el2n, residual)


@torch.no_grad()
def hidden_states(model: Any, input_ids_BS: Tensor, attention_mask_BS: Tensor | None = None) -> tuple[Any, Tensor]:
    """(the ``*ForCausalLM`` without adapter wrapper, (B, S, D) hidden states after the last norm)."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    outputs = causal.base_model(input_ids=input_ids_BS, attention_mask=attention_mask_BS, use_cache=False)
    return causal, outputs.last_hidden_state


@torch.no_grad()
def head_statistics(
    head: nn.Linear,
    hidden_TD: Tensor,
    target_T: Tensor,
    *,
    softcap: float | None = None,
    block_bytes: int = BLOCK_BYTES,
    row_sizes: Sequence[int] | None = None,
) -> TokenStats:
    """Statistics of target tokens from the final hidden states, block by block, all sums in float32.

    Args:
        head: the output projection, weight (V, D).
        hidden_TD: (T, D) final hidden states, after the last norm. target_T: (T,) int64 next tokens.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2), or None.
        block_bytes: upper bound of the float32 logits that exist at once.
        row_sizes: target tokens of each row in turn, adding up to T; then ``grad_norm`` is found in the same pass,
            from T x T inner products instead of the V x D gradient. Not with ``softcap``.

    Returns:
        Tensors of shape (T,), and ``grad_norm`` of shape (R,).
    """
    if row_sizes is not None and softcap is not None:
        raise ValueError("the gradient of softcapped logits is not what the row statistics stand for")
    width = min(_VOCAB_BLOCK, head.weight.shape[0])
    rows = max(1, block_bytes // (4 * width))
    sizes = [rows] * (len(target_T) // rows) + [len(target_T) % rows] if row_sizes is None else list(row_sizes)
    blocks: list[TokenStats] = []
    for group in _groups(sizes, rows):
        start = sum(len(block.nll) for block in blocks)
        span = slice(start, start + sum(group))
        # A row longer than a block is met with narrower strips of the vocabulary.
        columns = max(1, min(width, block_bytes // (4 * max(1, sum(group)))))
        parts = group if row_sizes is not None else None
        blocks.append(_block_statistics(head, hidden_TD[span], target_T[span], softcap, columns, parts))
    return _joined(blocks, hidden_TD.device)


def _groups(sizes: list[int], most: int) -> Iterator[list[int]]:
    """Neighbouring sizes that add up to at most ``most`` each; a larger one stands alone."""
    group: list[int] = []
    for size in sizes:
        if group and sum(group) + size > most:
            yield group
            group = []
        group.append(size)
    if group:
        yield group


def _joined(blocks: list[TokenStats], device: torch.device) -> TokenStats:
    """The blocks one after the other."""
    empty = torch.zeros(0, device=device)
    if not blocks:
        return TokenStats(empty, empty, empty.bool(), empty.bool(), empty, empty)
    names = ("nll", "entropy", "top1", "mask", "el2n", "residual")
    norms = [block.grad_norm for block in blocks if block.grad_norm is not None]
    joined = {name: torch.cat([getattr(block, name) for block in blocks]) for name in names}
    return TokenStats(**joined, grad_norm=torch.cat(norms) if norms else None)


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
    head: nn.Linear,
    hidden_ND: Tensor,
    target_N: Tensor,
    softcap: float | None,
    columns: int,
    row_sizes: Sequence[int] | None,
) -> TokenStats:
    """Statistics of N tokens, with a running log-sum-exp over blocks of the vocabulary."""
    weight, bias = head.weight, head.bias
    high_N = torch.full(target_N.shape, -torch.inf, device=hidden_ND.device)
    sum_N, squares_N, weighted_N = (torch.zeros_like(high_N) for _ in range(3))  # of exp(z - high); its square; times z
    target_logit_N = torch.zeros_like(high_N)
    overlaps = [torch.zeros(size, size, device=hidden_ND.device) for size in row_sizes or ()]
    for start in range(0, weight.shape[0], columns):
        strip = slice(start, start + columns)
        logits_NC = project(hidden_ND, weight[strip], None if bias is None else bias[strip], softcap)
        block_high_N = logits_NC.amax(dim=-1)
        here_N = (target_N >= start) & (target_N < start + logits_NC.shape[1])
        index_N = (target_N - start).clamp(0, logits_NC.shape[1] - 1)
        target_logit_N = torch.where(here_N, logits_NC.gather(1, index_N[:, None])[:, 0], target_logit_N)
        new_high_N = torch.maximum(high_N, block_high_N)
        rescale_N = torch.exp(high_N - new_high_N)
        exp_NC = torch.sub(logits_NC, new_high_N[:, None]).exp_()
        sum_N = sum_N * rescale_N + exp_NC.sum(dim=-1)
        squares_N = squares_N * rescale_N.square() + torch.linalg.vector_norm(exp_NC, dim=-1).square()
        add_overlaps(overlaps, exp_NC, rescale_N)
        weighted_N = weighted_N * rescale_N + logits_NC.mul_(exp_NC).sum(dim=-1)
        high_N = new_high_N
    log_total_N, mean_logit_N = high_N + sum_N.log(), weighted_N / sum_N
    nll_N = log_total_N - target_logit_N
    # |p - onehot|^2 = sum p^2 - 2 p_y + 1; rounding may take it below zero where p_y is 1.
    el2n_N = (squares_N / sum_N.square() - 2 * torch.exp(-nll_N) + 1).clamp_min(0).sqrt()
    norms = None
    if row_sizes is not None:
        norms = gradient_norms(head, hidden_ND, target_N, overlaps, high_N, sum_N)
    return TokenStats(
        nll_N,
        log_total_N - mean_logit_N,
        target_logit_N == high_N,
        torch.ones_like(target_N, dtype=torch.bool),
        el2n_N,
        mean_logit_N - target_logit_N,
        norms,
    )
