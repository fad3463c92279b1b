"""How many target tokens stay, and which ones once they have scores; the same for every token method.

Legend: N rows, T target tokens of all rows together, G groups of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from prunetune.methods.ranking import best_first, name_ranks
from prunetune.model.score_table import ScoreTable

# 0.7 * 10 is 7.000000000000001 in floating point; eight tokens are not what was asked for.
_SLACK = 1e-9


@dataclass(frozen=True)
class TokenBudget:
    """What must stay and how much may.

    Args:
        wanted: (N,) tokens that each row should keep when it is ranked for itself.
        total: tokens that all rows should keep when they are ranked together.
        least: (N,) tokens that each row keeps in any case; 0 for a row without targets.
        fixed: (T,) bool, tokens that are never dropped.
    """

    wanted: np.ndarray
    total: int
    least: np.ndarray
    fixed: np.ndarray


def token_budget(table: ScoreTable, kept: float, rows: np.ndarray | None, floor: float) -> TokenBudget:
    """The budget of a table; see ``choose_tokens`` for the arguments."""
    targets_N = table.targets
    fixed_T = np.zeros(int(table.offsets[-1]), dtype=bool)
    if "protected" in table.tokens:
        fixed_T |= table.tokens["protected"].astype(bool)
    if rows is not None:
        fixed_T |= ~np.asarray(rows, dtype=bool)[table.row_of_token]
    least_N = np.maximum(_share(targets_N, floor), np.minimum(targets_N, 1))
    return TokenBudget(
        wanted=np.maximum(_share(targets_N, kept), least_N),
        total=math.floor(kept * int(targets_N.sum()) + 0.5),
        least=least_N,
        fixed=fixed_T,
    )


def _share(counts_N: np.ndarray, fraction: float) -> np.ndarray:
    return np.ceil(counts_N * fraction - _SLACK).astype(np.int64)


def highest_tokens(table: ScoreTable, scores_T: np.ndarray, budget: TokenBudget, together: bool) -> np.ndarray:
    """(T,) bool, the tokens with the highest scores that the budget allows.

    Args:
        table: the rows.
        scores_T: (T,) higher is kept first.
        budget: from ``token_budget``.
        together: rank the tokens of all rows together (else each row for itself).
    """
    keep_T = budget.fixed.copy()
    row_T = table.row_of_token
    names_N = name_ranks(table.ids)
    places_T = np.arange(len(row_T)) - table.offsets[row_T]
    order = best_first(scores_T, names_N[row_T], places_T)
    order = order[~keep_T[order]]
    # Each row's own best first; the sort is stable, so within a row the order stays.
    by_row = order[np.argsort(row_T[order], kind="stable")]
    free_N = np.bincount(row_T[by_row], minlength=len(table))
    turn = np.arange(len(by_row)) - np.repeat(np.cumsum(free_N) - free_N, free_N)
    fixed_N = table.targets - free_N
    quota_N = (budget.least if together else budget.wanted) - fixed_N
    keep_T[by_row[turn < quota_N[row_T[by_row]]]] = True
    if together:
        rest = order[~keep_T[order]]
        keep_T[rest[: max(0, budget.total - int(keep_T.sum()))]] = True
    return keep_T


def without_groups(
    table: ScoreTable, scores_T: np.ndarray, groups_T: np.ndarray, budget: TokenBudget, together: bool
) -> np.ndarray:
    """(T,) bool, what is left when whole groups leave, the lowest score first, until the budget is met.

    A group with a fixed token, a row's last group, and one without which its row would fall below its floor stay.

    Args:
        table: the rows.
        scores_T: (T,) the lowest score of a group's tokens is the group's.
        groups_T: (T,) number of the group within its row.
        budget: from ``token_budget``.
        together: the budget of all rows together (else each row has its own).
    """
    row_T = table.row_of_token
    keys, group_T = np.unique(np.stack([row_T, groups_T.astype(np.int64)]), axis=1, return_inverse=True)
    group_T = group_T.reshape(-1)
    row_G, number_G = keys
    size_G = np.bincount(group_T, minlength=len(row_G))
    score_G = np.full(len(row_G), np.inf)
    # What cannot be judged leaves last, as tokens with such a score are kept last among tokens: nothing speaks for
    # removing a whole paragraph.
    np.minimum.at(score_G, group_T, np.where(np.isfinite(scores_T), scores_T, np.inf))
    stays_G = np.bincount(group_T, weights=budget.fixed, minlength=len(row_G)) > 0
    stays_G |= np.append(row_G[1:] != row_G[:-1], True)
    left_N, left = table.targets.copy(), int(table.targets.sum())
    removed_G = np.zeros(len(row_G), dtype=bool)
    finite = np.where(np.isfinite(score_G), score_G, np.finfo(np.float64).max)
    for group in best_first(-finite, name_ranks(table.ids)[row_G], number_G):
        row, size = row_G[group], int(size_G[group])
        enough = left <= budget.total if together else left_N[row] <= budget.wanted[row]
        if not (enough or stays_G[group] or left_N[row] - size < budget.least[row]):
            removed_G[group] = True
            left_N[row] -= size
            left -= size
    return ~removed_G[group_T]
