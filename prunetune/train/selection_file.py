"""``selection.jsonl``: what every optimizer step was trained on and why, one JSON object a step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from prunetune.core.files import write_text
from prunetune.train.selection_choice import StepChoice


class SelectionFile:
    """Appends a line a step; only the first process writes.

    Args:
        path: of the file.
        writes: whether this process is the first.
    """

    def __init__(self, path: Path, writes: bool):
        self._path, self._writes = path, writes

    def go_on_from(self, step: int) -> None:
        """Drops the lines of steps that will be done again, and one that was cut short."""
        if not self._writes or not self._path.exists():
            return
        lines = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self._path, "".join(f"{line}\n" for line in lines))

    def add(self, step: int, choice: StepChoice, facts: dict[str, Any]) -> None:
        """Writes the line of 1-based optimizer step ``step``; rows as [id, reason, value]."""
        if not self._writes:
            return
        kept: list[list[Any]] = []
        dropped: list[list[Any]] = []
        for name, row in sorted(choice.rows.items()):
            entry = [name, row.reason, _number(row.value)]
            if row.weight != 1:
                entry.append(_number(row.weight))
            (kept if row.keep else dropped).append(entry)
        line = {"step": step, **facts, "threshold": _number(choice.threshold), "kept": kept, "dropped": dropped}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _number(value: float | None) -> float | None:
    """Seven digits; null for what is not finite, which JSON has no word for."""
    return float(f"{value:.7g}") if value is not None and math.isfinite(value) else None
