"""From scores to rows and labels: which samples stay and which of their tokens the loss sees. No model is needed.

What is written about a selection is in ``selection_folder.py``.
Legend: N rows, T target tokens of all rows together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.core.errors import ConfigError, DataError, Problem, suggest
from prunetune.data.store import StoredScores, read_scores
from prunetune.methods.samples import SampleChoice, build_samples, check_samples
from prunetune.methods.samples._stratify import choose_stratified, make_strata
from prunetune.methods.tokens import Scope, build_tokens, check_tokens, choose_tokens

STRATA = ("source", "label", "length")


@dataclass(frozen=True)
class SelectionSettings:
    """What was asked for; fractions are in [0, 1]."""

    samples_method: str | None = None
    samples_kept: float = 1.0
    samples_options: Mapping[str, Any] = field(default_factory=dict)
    tokens_method: str | None = None
    tokens_kept: float = 1.0
    tokens_options: Mapping[str, Any] = field(default_factory=dict)
    scope: Scope = "sample"
    floor: float = 0.1
    stratify: str = "none"
    minimum: int = 0
    seed: int = 0

    @property
    def strata(self) -> list[Any]:
        """What rows are stratified by."""
        return [] if self.stratify == "none" else [name.strip() for name in self.stratify.split(",")]

    def problems(self) -> list[Problem]:
        """Everything that cannot work, before scores are looked at."""
        found = []
        for part, method, kept in (
            ("samples", self.samples_method, self.samples_kept),
            ("tokens", self.tokens_method, self.tokens_kept),
        ):
            if not 0 < kept <= 1:
                found.append(Problem(f"{kept:.0%} is not above 0% and at most 100%", part))
            elif method is None and kept < 1:
                found.append(
                    Problem(f"{kept:.0%} are to stay, but no method says which; name a {part[:-1]} method", part)
                )
        found += check_samples(self.samples_method, self.samples_options) if self.samples_method else []
        found += check_tokens(self.tokens_method, self.tokens_options) if self.tokens_method else []
        for part, method, options in (
            ("samples", self.samples_method, self.samples_options),
            ("tokens", self.tokens_method, self.tokens_options),
        ):
            if options and method is None:
                found.append(Problem(f"options {', '.join(options)} are of no method; name a {part[:-1]} method", part))
        if self.scope not in ("sample", "all"):
            found.append(Problem(f"unknown scope {self.scope!r}; {suggest(self.scope, ('sample', 'all'))}", "scope"))
        if not 0 <= self.floor <= 1:
            found.append(Problem(f"{self.floor:.0%} is not between 0% and 100%", "floor"))
        for name in self.strata:
            if name not in STRATA:
                found.append(Problem(f"unknown stratum {name!r}; {suggest(name, (*STRATA, 'none'))}", "stratify"))
        if self.strata and self.samples_method is None:
            found.append(Problem("strata share out a choice of samples; name a sample method", "stratify"))
        if self.minimum < 0:
            found.append(Problem(f"{self.minimum} is below 0", "minimum"))
        if self.minimum > 0 and not self.strata:
            found.append(Problem("is a number of rows of each stratum; set stratify, e.g. to source", "minimum"))
        return found


@dataclass(frozen=True)
class Selection:
    """Which rows and tokens stay.

    Args:
        scores: what the selection was made from.
        choice: what was decided about each row, and why.
        kept: (T,) bool, target tokens that stay; False for all of a dropped row's.
        removes: dropped tokens of kept rows leave the text (else only the loss).
        settings: what was asked for.
        folder: where the scores are, if they are on disk.
    """

    scores: StoredScores
    choice: SampleChoice
    kept: np.ndarray
    removes: bool
    settings: SelectionSettings
    folder: Path | None = None

    @property
    def rows(self) -> np.ndarray:
        """Numbers of the rows that stay."""
        return np.flatnonzero(self.choice.keep)

    def dropped(self, row: int) -> np.ndarray:
        """Positions of a row's target tokens that do not stay, ascending."""
        table = self.scores.table
        span = slice(int(table.offsets[row]), int(table.offsets[row + 1]))
        return table.tokens["position"][span][~self.kept[span]]

    def example(self, row: int) -> dict[str, Any]:
        """A kept row as training sees it: input_ids, labels, id."""
        ids = np.asarray(self.scores.input_ids[row], dtype=np.int64)
        labels = np.asarray(self.scores.labels[row], dtype=np.int64)
        dropped = self.dropped(row)
        if self.removes:
            ids, labels = np.delete(ids, dropped), np.delete(labels, dropped)
        elif len(dropped):
            labels = labels.copy()
            labels[dropped] = -100
        return {"input_ids": ids.tolist(), "labels": labels.tolist(), "id": self.scores.table.ids[row]}

    def dataset(self) -> Any:
        """The kept rows as a ``datasets.Dataset`` with input_ids, labels and id, which plain TRL trains on as it is.

        Rows are in the order of their ids. A column weight is added if the method weighs rows; TRL does not read it.
        """
        import datasets

        examples = [self.example(int(row)) for row in self.rows]
        columns = {name: [example[name] for example in examples] for name in ("input_ids", "labels", "id")}
        if self.choice.weight is not None:
            columns["weight"] = self.choice.weight[self.rows].tolist()
        return datasets.Dataset.from_dict(columns)


def select(
    scores: StoredScores | Path | str,
    *,
    samples_method: str | None = None,
    samples_kept: float = 1.0,
    samples_options: Mapping[str, Any] | None = None,
    tokens_method: str | None = None,
    tokens_kept: float = 1.0,
    tokens_options: Mapping[str, Any] | None = None,
    scope: Scope = "sample",
    floor: float = 0.1,
    stratify: str = "none",
    minimum: int = 0,
    seed: int = 0,
) -> Selection:
    """Chooses rows, then target tokens of the rows that stay. Seconds, whatever the model was.

    Args:
        scores: what ``score`` returned, or the folder it wrote.
        samples_method: see ``prunetune list samples``; None: every row with targets.
        samples_kept: fraction of all scored rows that stays; rounded, at least one row.
        samples_options: the method's own.
        tokens_method: see ``prunetune list tokens``; None: all targets of the rows that stay.
        tokens_kept: fraction of the kept rows' target tokens that stays.
        tokens_options: the method's own.
        scope: rank tokens within each ``sample``, or ``all`` together.
        floor: every row keeps at least this fraction of its targets, and at least one.
        stratify: ``source``, ``label``, ``length``, several with commas, or ``none``: strata keep their shares.
        minimum: rows that every stratum keeps if it has so many.
        seed: for methods that draw by lot.

    Returns:
        The selection; ``dataset()`` is what to train on.

    Raises:
        ConfigError: unknown methods or options, or settings that cannot work (all at once).
        DataError: the scores lack a column that the method reads, or nothing would stay.

    Example:
        >>> kept = select("scores", samples_method="q_tuning", samples_kept=0.25)  # doctest: +SKIP
        >>> SFTTrainer(model, train_dataset=kept.dataset())                        # doctest: +SKIP
    """
    settings = SelectionSettings(
        samples_method, samples_kept, dict(samples_options or {}), tokens_method, tokens_kept,
        dict(tokens_options or {}), scope, floor, stratify, minimum, seed,
    )  # fmt: skip
    if problems := settings.problems():
        raise ConfigError(problems)
    folder = None if isinstance(scores, StoredScores) else Path(scores)
    stored = scores if isinstance(scores, StoredScores) else read_scores(Path(scores))
    choice = _choose_rows(stored, settings)
    if not choice.keep.any():
        reasons = ", ".join(f"{name} ({(choice.reason == name).sum()})" for name in sorted(set(choice.reason)))
        raise DataError(
            f"{samples_method or 'this selection'} keeps none of {len(stored.table)} rows; they were dropped as "
            f"{reasons}. Check the scores, or take another method"
        )
    kept, removes = _choose_tokens(stored, choice, settings)
    return Selection(stored, choice, kept, removes, settings, folder)


def _choose_rows(stored: StoredScores, settings: SelectionSettings) -> SampleChoice:
    table = stored.table
    if settings.samples_method is None:
        keep = table.targets > 0
        return SampleChoice(keep, np.full(len(table), np.nan), np.where(keep, "all", "no_target").astype(object))
    method = build_samples(settings.samples_method, settings.samples_options, settings.seed)
    count = max(1, int(settings.samples_kept * len(table) + 0.5))
    if settings.strata:
        return choose_stratified(method, table, count, make_strata(table, settings.strata), settings.minimum)
    return method.choose(table, count)


def _choose_tokens(stored: StoredScores, choice: SampleChoice, settings: SelectionSettings) -> tuple[np.ndarray, bool]:
    """(T,) bool, and whether the dropped ones leave the text."""
    table = stored.table
    kept_T = choice.keep[table.row_of_token]
    if settings.tokens_method is None:
        return kept_T, False
    method = build_tokens(settings.tokens_method, settings.tokens_options, settings.seed)
    prunable = None if choice.prunable is None else choice.prunable[choice.keep]
    part = table.pick(choice.keep)
    kept_T[kept_T] = choose_tokens(
        method, part, settings.tokens_kept, rows=prunable, scope=settings.scope, floor=settings.floor
    )
    return kept_T, method.removes


def settings_json(settings: SelectionSettings) -> dict[str, Any]:
    """The settings as JSON values."""
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in asdict(settings).items()}
