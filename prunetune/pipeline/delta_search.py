"""A delta method's option that is left to a search: values are tried on rows, the best one is taken.

Each try uses the very masks that will be used in the end, and the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prunetune.core.console import note
from prunetune.core.errors import ExportError
from prunetune.evaluate.output_change import OutputChange
from prunetune.evaluate.perplexity import domain_perplexity
from prunetune.methods.deltas import By, build_delta
from prunetune.model.token_rows import TokenRow

# A search goes on for so many tries that are worse than the best one.
_PATIENCE = 2


@dataclass(frozen=True)
class Searched:
    """Options that leave nothing open, and what was tried for that: (value, score), lower is better."""

    options: dict[str, Any]
    option: str = ""
    tried: tuple[tuple[float, float], ...] = ()


def search(method: str, options: Mapping[str, Any], score: Callable[[dict[str, Any]], float]) -> Searched:
    """The best value of the option that the method leaves open; from coarse to fine, as in arXiv 2410.09344.

    Args:
        method: a delta method. options: its options.
        score: what a setting of all options is worth on rows, lower is better.

    Raises:
        ExportError: no value gives a finite score.
    """
    asked = build_delta(method, options).search
    if asked is None:
        return Searched(dict(options))
    tried: dict[float, float] = {}

    def attempt(value: float) -> None:
        if value not in tried:
            found = score({**options, **asked.fixed, asked.option: value})
            tried[value] = found if math.isfinite(found) else math.inf

    worse = 0
    for value in asked.values:
        attempt(value)
        worse = 0 if tried[value] == min(tried.values()) else worse + 1
        if worse > _PATIENCE:
            break
    for neighbour in _between(min(tried, key=tried.__getitem__), sorted(tried)):
        attempt(neighbour)
    best = min(tried, key=tried.__getitem__)
    if not math.isfinite(tried[best]):
        raise ExportError(f"no {asked.option} of {method} leaves a model that computes; lower drop")
    note(f"{method}: {asked.option} {best:.3g} of {len(tried)} tried ({tried[best]:.4f})")
    return Searched({**options, **asked.fixed, asked.option: best}, asked.option, tuple(sorted(tried.items())))


def _between(best: float, values: Sequence[float]) -> list[float]:
    """Middles of the best value and its neighbours; geometric ones, but next to 0."""
    place = values.index(best)
    others = (*values[max(0, place - 1) : place], *values[place + 1 : place + 2])
    return [math.sqrt(best * other) or max(best, other) / 2 for other in others]


class Judge:
    """What a search goes by.

    Args:
        model: with the whole delta in it; only looked at for ``outputs``.
        tokenizer: its tokenizer. rows: at least one, with labels for ``loss``.
        by: loss: of the labels. outputs: how far logits move away from the whole delta's.
    """

    def __init__(self, model: Any, tokenizer: Any, rows: Sequence[TokenRow], by: By = "loss"):
        self._tokenizer, self._rows = tokenizer, [asdict(row) for row in rows]
        self._change = OutputChange(model, rows) if by == "outputs" else None

    def __call__(self, model: Any) -> float:
        """Score of the model as it is now, lower is better."""
        if self._change is not None:
            return self._change(model)
        return domain_perplexity(model, self._tokenizer, self._rows, None).nll
