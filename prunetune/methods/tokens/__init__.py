"""Token methods: which target tokens the loss should see. One file is one method: a score per token, higher = keep.

Scope, budget, floor and protected tokens are the same for all of them and live in ``choose_tokens``.
Legend: N rows, T target tokens of all rows together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from prunetune.core.errors import Problem
from prunetune.core.registry import Registry
from prunetune.methods.options import parse_options, problems_of
from prunetune.methods.table_method import TableMethod
from prunetune.methods.tokens._budget import highest_tokens, token_budget, without_groups
from prunetune.model.score_table import ScoreTable

Scope = Literal["sample", "all"]


class TokenMethod(TableMethod):
    """A method that ranks target tokens."""

    # Whether dropped tokens leave the text; by default they leave the loss only.
    removes: ClassVar[bool] = False

    @abstractmethod
    def scores(self, table: ScoreTable) -> np.ndarray:
        """(T,) float64, higher is kept first; tokens with a score that is not finite are kept last."""

    def groups(self, table: ScoreTable) -> np.ndarray | None:
        """(T,) int, tokens of one row with the same number stay or leave together; None: each for itself.

        Groups leave one after the other, the lowest score of any of their tokens first, until no more than the wanted
        fraction is left; each row's last group stays. One whose scores are not finite leaves last.
        """
        return None


TOKENS: Registry[type[TokenMethod]] = Registry("token method", "prunetune.methods.tokens")


def build_tokens(method: str, options: Mapping[str, Any], seed: int = 0) -> TokenMethod:
    """The token method called ``method``; raises ConfigError for unknown names, options and values."""
    kind = TOKENS.get(method)
    return kind(parse_options("data.tokens", method, kind.Options, options), seed)


def check_tokens(method: str, options: Mapping[str, Any]) -> list[Problem]:
    """The problems that ``build_tokens`` would raise."""
    return problems_of(lambda: build_tokens(method, options))


def choose_tokens(
    method: TokenMethod,
    table: ScoreTable,
    kept: float,
    *,
    rows: np.ndarray | None = None,
    scope: Scope = "sample",
    floor: float = 0.1,
) -> np.ndarray:
    """Which target tokens stay in the loss.

    Args:
        method: what ranks them.
        table: the rows that are kept.
        kept: fraction of all target tokens of the table that stays. With ``scope`` sample every prunable row keeps
            this fraction of its own (rounded up); with all the budget is common, and what rows outside ``rows`` keep
            counts toward it.
        rows: (N,) bool, rows whose tokens may be dropped; None: all.
        scope: ``sample`` ranks inside each row, ``all`` across the rows.
        floor: every row keeps at least this fraction of its targets, and at least one.

    Returns:
        (T,) bool. Protected tokens and tokens of rows outside ``rows`` are always kept; the fraction is met exactly
        (``all``: rounded to a token) unless those and the floors do not allow it, or whole groups leave. Neither the
        order of the rows nor noise in the last bits of a score changes what is kept.

    Raises:
        DataError: the table lacks a column that the method reads.
        ValueError: ``kept`` is not in (0, 1], or ``floor`` not in [0, 1].
    """
    if not (0 < kept <= 1 and 0 <= floor <= 1):
        raise ValueError(f"kept {kept} is not in (0, 1], or floor {floor} not in [0, 1]")
    table.require(method.needs, type(method).__name__)
    budget = token_budget(table, kept, rows, floor)
    if kept == 1 or budget.fixed.all():
        return np.ones(int(table.offsets[-1]), dtype=bool)
    scores_T = method.scores(table)
    groups_T = method.groups(table)
    if groups_T is not None:
        return without_groups(table, scores_T, groups_T, budget, scope == "all")
    return highest_tokens(table, scores_T, budget, scope == "all")
