"""Prefill and decode speed of models, measured side by side in one process; peak memory is in memory.py.

Absolute times on a shared machine drift by tens of percent, so models take turns and ratios are formed within
a turn. The middle half of the values (quartiles) is reported with every median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

METRICS = ("prefill_tps_b1", "prefill_tps_b8", "decode_tps_b1", "decode_tps_b8")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Speed:
    """One model's tokens per second, by name: METRICS, or the same with other batch sizes.

    ``ratios`` are to the first model of the comparison, above 1 = faster (all 1 for the first itself).
    """

    tokens_per_second: dict[str, Spread]
    ratios: dict[str, Spread]


def compare_speed(
    models: Mapping[str, Any],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    repeats: int = 5,
    batch_sizes: Sequence[int] = (1, 8),
) -> dict[str, Speed]:
    """Measures models turn by turn: every repeat times each model once, in alternating order.

    Prefill is one forward pass over the prompt that fills the KV cache and computes the last token's logits;
    decode is a greedy loop over the cache of exactly ``new_tokens`` steps, whatever tokens come out.

    Args:
        models: label -> causal model, all on one device; the first is what ratios refer to.
        prompt_tokens: length of the prompt. new_tokens: decode steps timed.
        repeats: turns, after one warm-up.

    Returns:
        label -> Speed; ratios are medians of per-turn ratios, so drift of the machine cancels.
    """
    labels = list(models)
    rates: dict[str, dict[str, list[float]]] = {label: {} for label in labels}
    for batch_size in batch_sizes:
        prompts = {label: _prompt(models[label], batch_size, prompt_tokens, models.values()) for label in labels}
        for label in labels:
            _time_once(models[label], prompts[label], min(2, new_tokens))
        for turn in range(repeats):
            # Back and forth, so that no model always comes first.
            for label in labels if turn % 2 == 0 else reversed(labels):
                prefill, decode = _time_once(models[label], prompts[label], new_tokens)
                rates[label].setdefault(f"prefill_tps_b{batch_size}", []).append(prefill)
                rates[label].setdefault(f"decode_tps_b{batch_size}", []).append(decode)
    first = rates[labels[0]]
    return {label: _summary(rates[label], first) for label in labels}


def _summary(mine: dict[str, list[float]], first: dict[str, list[float]]) -> Speed:
    ratios = {
        name: Spread.of([a / b for a, b in zip(values, first[name], strict=True)]) for name, values in mine.items()
    }
    return Speed({name: Spread.of(values) for name, values in mine.items()}, ratios)


def _prompt(model: Any, batch_size: int, length: int, models: Any) -> torch.Tensor:
    """The same (batch, length) ids for every model: arithmetic, not random, and inside every vocabulary."""
    smallest = min(other.config.get_text_config().vocab_size for other in models)
    ids = (torch.arange(batch_size * length) * 7919 + 13) % smallest
    return ids.reshape(batch_size, length).to(model.device)


@torch.inference_mode()
def _time_once(model: Any, prompt_BS: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """(prefill, decode) tokens per second over the whole batch."""
    batch, length = prompt_BS.shape
    started = _now(model.device)
    outputs = model(input_ids=prompt_BS, use_cache=True, logits_to_keep=1)
    filled = _now(model.device)
    token_B1 = outputs.logits[:, -1:].argmax(dim=-1)
    for _ in range(new_tokens):
        outputs = model(input_ids=token_B1, past_key_values=outputs.past_key_values, use_cache=True)
        token_B1 = outputs.logits[:, -1:].argmax(dim=-1)
    ended = _now(model.device)
    return batch * length / (filled - started), batch * new_tokens / (ended - filled)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
