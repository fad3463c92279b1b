"""Every error that prunetune raises on purpose: what was set, why it cannot work, what to set instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class PrunetuneError(Exception):
    """Base of all deliberate errors; the command line prints its text without a traceback."""


class BudgetError(PrunetuneError):
    """The budget cannot be met by any legal shape of this model."""


class DataError(PrunetuneError):
    """The data is missing, malformed, or leaves nothing to train on."""


class UnsupportedModelError(PrunetuneError):
    """The architecture, its quantisation, or a combination with it is not supported."""


class PlanMismatchError(PrunetuneError):
    """A plan (or adapter, or checkpoint) was made for another model."""


class ExportError(PrunetuneError):
    """An export could not be written or did not verify; the previous artefact is untouched."""


class DivergedError(PrunetuneError):
    """The loss became NaN or infinite."""


class ProcessLostError(PrunetuneError):
    """Another process of the same run ended before its time."""


class FolderInUseError(PrunetuneError):
    """Another process works in the same folder."""


class DiskFullError(PrunetuneError):
    """There was no room for something that had to be written; what was there before is whole."""


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: a scheduler wants the machine back. Everything is saved and the same command goes on."""


@dataclass(frozen=True)
class Problem:
    """One fault in a configuration. ``where`` is ``file:line`` or the name of the field."""

    message: str
    field: str = ""
    where: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.field, self.message) if part)


class ConfigError(PrunetuneError):
    """All the faults of a configuration at once."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in the configuration"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


def suggest(word: str, known: Iterable[str]) -> str:
    """A ``did you mean`` clause for a misspelt ``word``, or the list of what exists."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return "known: " + ", ".join(names)
