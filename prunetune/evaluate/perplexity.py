"""Perplexity over the target tokens of held-out rows, and of plain prose in contiguous windows.

Shapes: B batch, S sequence. Sums run over tokens, in float64; batch size and order change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunetune.core.errors import DataError
from prunetune.model.token_rows import IGNORED_LABEL, TokenRow, token_rows
from prunetune.model.token_stats import evaluating, token_statistics


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by text.

    Args:
        perplexity: exp(nll).
        nll: mean negative log-likelihood of a target token, in nats.
        tokens: target tokens.
        top1: fraction of target tokens that the model thought likeliest.
    """

    perplexity: float
    nll: float
    tokens: int
    top1: float


def domain_perplexity(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    max_length: int | None = 512,
    batch_size: int = 8,
    *,
    completion_only: bool | None = None,
    assistant_only: bool = False,
) -> Perplexity:
    """Perplexity over the target tokens of rows, tokenised as SFTTrainer would train on them.

    ``log(perplexity)`` is SFTTrainer's eval loss when that runs in one batch. Over several batches TRL
    averages the batches' means whatever their token counts; here every token weighs the same.

    Args:
        rows: prompt-completion (plain or conversational), messages or text rows.
        max_length: longer rows are cut at the end, in tokens; None keeps them whole.
        completion_only: see ``token_rows``. assistant_only: see ``token_rows``.

    Raises:
        DataError: no row, an unknown layout, or no target token left.
    """
    encoded = token_rows(tokenizer, rows, max_length, completion_only=completion_only, assistant_only=assistant_only)
    # Rows of like length share a batch, so that little is padded.
    return _perplexity(model, sorted(encoded, key=lambda row: -len(row.input_ids)), batch_size)


def text_perplexity(
    model: Any, tokenizer: Any, text: str, max_tokens: int = 8192, window: int = 512, batch_size: int = 4
) -> Perplexity:
    """Perplexity of the first ``max_tokens`` tokens of plain text, in contiguous windows.

    Windows do not see each other. Each starts with the beginning-of-sequence token if the tokenizer uses one
    (Gemma is far off without it); a window's first token is a target only then.

    Raises:
        DataError: fewer than two tokens.
    """
    start = [tokenizer.bos_token_id] if _starts_with_bos(tokenizer) else []
    ids = list(tokenizer(text=text, add_special_tokens=False)["input_ids"])[:max_tokens]
    size = window - len(start)
    windows = [
        TokenRow(start + part, [IGNORED_LABEL] * len(start) + part)
        for part in (ids[i : i + size] for i in range(0, len(ids), size))
    ]
    if not any(row.targets for row in windows):
        raise DataError(f"the general text has {len(ids)} tokens; give at least a few hundred")
    return _perplexity(model, windows, batch_size)


@torch.inference_mode()
def _perplexity(model: Any, rows: Sequence[TokenRow], batch_size: int) -> Perplexity:
    total_nll, tokens, top1 = 0.0, 0, 0
    with evaluating(model):
        for first in range(0, len(rows), batch_size):
            ids_BS, labels_BS, attention_BS = _padded(rows[first : first + batch_size], model.device)
            stats = token_statistics(model, ids_BS, labels_BS, attention_BS)
            total_nll += float(stats.nll.double().sum())
            tokens += int(stats.mask.sum())
            top1 += int(stats.top1.sum())
    nll = total_nll / tokens
    return Perplexity(math.exp(min(nll, 700.0)), nll, tokens, top1 / tokens)


def _padded(rows: Sequence[TokenRow], device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, labels, attention mask), each (B, S), padded on the right."""
    length = max(len(row.input_ids) for row in rows)
    # Any id will do where the mask is 0: causal attention never looks at what is on the right.
    ids = [row.input_ids + [0] * (length - len(row.input_ids)) for row in rows]
    labels = [row.labels + [IGNORED_LABEL] * (length - len(row.labels)) for row in rows]
    mask = [[1] * len(row.input_ids) + [0] * (length - len(row.input_ids)) for row in rows]
    return tuple(torch.tensor(values, device=device) for values in (ids, labels, mask))  # type: ignore[return-value]


def _starts_with_bos(tokenizer: Any) -> bool:
    if tokenizer.bos_token_id is None:
        return False
    return list(tokenizer(text="a")["input_ids"])[:1] == [tokenizer.bos_token_id]
