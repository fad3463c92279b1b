"""What one optimizer step trains on, decided from its rows' statistics; pure, so every process decides the same.

Legend: N rows, T target tokens of all rows together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from prunetune.config.schema import SelectionConfig
from prunetune.config.selection_rules import row_count
from prunetune.core.streams import stream
from prunetune.methods.samples import SampleChoice, build_samples
from prunetune.methods.tokens import build_tokens, choose_tokens
from prunetune.model.score_table import ScoreTable

# Reasons that are given here; the methods have their own.
KEPT, BAD, EMPTY, FLOOR = "all", "bad_score", "no_target", "floor"


@dataclass(frozen=True)
class RowChoice:
    """What happens to one row.

    Args:
        keep: whether it is trained on.
        reason: short code, see SampleChoice.
        value: the number that decided; NaN where there was none.
        tokens: (T,) bool, which of its targets stay in the loss; None: all.
        weight: of its loss.
    """

    keep: bool
    reason: str
    value: float = float("nan")
    tokens: np.ndarray | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class StepChoice:
    """The decision about all rows of a step, by id.

    Args:
        rows: id -> what happens to it.
        threshold: value at the border between kept and dropped, if the method has one.
    """

    rows: Mapping[str, RowChoice]
    threshold: float | None = None

    def keeps_everything(self) -> bool:
        """Whether the step is what it would be without a choice."""
        return all(
            row.keep and row.weight == 1 and (row.tokens is None or bool(row.tokens.all()))
            for row in self.rows.values()
        )

    def with_tokens(self, tokens: StepChoice) -> StepChoice:
        """This choice of rows with another one's choice of tokens; rows that the other one drops are dropped."""
        rows = dict(self.rows)
        for name, other in tokens.rows.items():
            if other.keep:
                rows[name] = replace(rows[name], tokens=other.tokens)
            else:
                rows[name] = replace(rows[name], keep=False, reason=other.reason)
        return StepChoice(rows, self.threshold)


def step_seed(seed: int, step: int) -> int:
    """Methods that draw by lot draw anew in every step, and the same after a resumption."""
    return int(stream(seed, "selection", step).integers(2**31))


def choose_rows(config: SelectionConfig, table: ScoreTable, unusable: Mapping[str, str], step: int) -> StepChoice:
    """Which rows of a step stay, and which of their target tokens.

    Args:
        config: the methods.
        table: statistics of the rows that can be judged.
        unusable: id -> reason of the rows that cannot: no target, or statistics that are not finite. They are kept
            only if there is no other row, so that a step is never empty.
        step: 0-based optimizer step.

    Returns:
        The choice about all of them; exactly ``row_count`` rows for methods that rank.
    """
    seed = step_seed(config.seed, step)
    rows = {name: RowChoice(False, reason) for name, reason in unusable.items()}
    if not len(table):
        first = min(unusable)
        rows[first] = RowChoice(True, FLOOR)
        return StepChoice(rows)
    chosen = _choice(config, table, len(unusable), seed)
    keep_N = chosen.keep.astype(bool)
    reason_N = chosen.reason.astype(object)
    if not keep_N.any():
        # Every row was filtered: the first by id stands in, rather than a step without data.
        keep_N[0], reason_N[0] = True, FLOOR
    kept = np.flatnonzero(keep_N)
    tokens_T, part = _tokens(config, table.pick(kept), chosen, kept, seed)
    for number, name in enumerate(table.ids):
        value = float(chosen.value[number])
        rows[name] = RowChoice(bool(keep_N[number]), str(reason_N[number]), value)
    for place, row in enumerate(kept):
        name = table.ids[int(row)]
        own = None if tokens_T is None else tokens_T[part[place] : part[place + 1]]
        weight = 1.0 if chosen.weight is None else float(chosen.weight[row])
        rows[name] = RowChoice(True, rows[name].reason, rows[name].value, own, weight)
    return StepChoice(rows, chosen.threshold)


def _choice(config: SelectionConfig, table: ScoreTable, unusable: int, seed: int) -> SampleChoice:
    samples = config.samples
    if samples.method is None:
        nan_N = np.full(len(table), np.nan)
        return SampleChoice(np.ones(len(table), dtype=bool), nan_N, np.full(len(table), KEPT, dtype=object))
    method = build_samples(samples.method, samples.options(), seed)
    return method.choose(table, min(row_count(samples.kept, len(table) + unusable), len(table)))


def _tokens(
    config: SelectionConfig, kept: ScoreTable, chosen: SampleChoice, rows: np.ndarray, seed: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """((T,) bool over the kept rows' tokens, where each row's begin); None: all of them."""
    tokens = config.tokens
    if tokens.method is None:
        return None, kept.offsets
    method = build_tokens(tokens.method, tokens.options(), seed)
    prunable = None if chosen.prunable is None else chosen.prunable.astype(bool)[rows]
    chosen_T = choose_tokens(method, kept, tokens.kept, rows=prunable, scope=tokens.scope, floor=tokens.floor)
    return chosen_T, kept.offsets
