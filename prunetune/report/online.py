"""What choosing rows and tokens while training came to: totals and reasons, from ``selection.jsonl``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.core.sizes import format_fraction
from prunetune.methods.reasons import meaning

AMOUNTS = {"rows": "rows", "target_tokens": "target tokens", "forward_tokens": "tokens through the model"}


@dataclass(frozen=True)
class OnlineSelection:
    """Sums over the optimizer steps that chose.

    Args:
        steps: how many there were. scored: rows that a forward pass of their own scored.
        amounts: (what, kept, all). reasons: (code, meaning, decision, share of all decisions).
        never: share of the rows met that no step trained on.
    """

    steps: int
    scored: int
    amounts: tuple[tuple[str, int, int], ...]
    reasons: tuple[tuple[str, str, str, str], ...]
    never: float

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) lines for the report."""
        lines = [
            (f"{what} kept".capitalize(), f"{kept:,} of {whole:,} ({format_fraction(kept / whole)})")
            for what, kept, whole in self.amounts
            if whole
        ]
        lines.append(("Rows that no step trained on", format_fraction(self.never)))
        return [
            ("Steps that chose", f"{self.steps:,}"),
            *lines,
            ("Rows scored in a pass of their own", f"{self.scored:,}"),
        ]


def read_online(path: Path, method: str) -> OnlineSelection | None:
    """The sums of a run's ``selection.jsonl``; None if nothing was chosen.

    Args:
        method: what chose the rows, for the reasons' wording.
    """
    steps = list(_lines(path))
    if not steps:
        return None
    decisions = Counter(
        (decision, entry[1]) for step in steps for decision in ("kept", "dropped") for entry in step[decision]
    )
    met = {entry[0] for step in steps for decision in ("kept", "dropped") for entry in step[decision]}
    trained = {entry[0] for step in steps for entry in step["kept"]}
    return OnlineSelection(
        steps=len(steps),
        scored=sum(step["scored"] for step in steps),
        amounts=tuple(
            (what, sum(step[name][0] for step in steps), sum(step[name][1] for step in steps))
            for name, what in AMOUNTS.items()
        ),
        reasons=tuple(
            (reason, meaning(reason, method), decision, format_fraction(count / decisions.total()))
            for (decision, reason), count in decisions.most_common()
        ),
        never=1 - len(trained) / len(met) if met else 0.0,
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The file's steps; a last line that was cut short by a crash is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
