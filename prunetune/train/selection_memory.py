"""Statistics of rows that were scored some steps ago, to be used again, in memory and in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from prunetune.train.checkpoint import MEMORY_FILE
from prunetune.train.selection_scoring import RowScores


class Memory:
    """id -> (step of scoring, statistics).

    Args:
        steps: statistics are used again in the ``steps`` optimizer steps after the one that found them.
    """

    def __init__(self, steps: int):
        self._steps = steps
        self._found: dict[str, tuple[int, RowScores]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def recall(self, ids: Iterable[str], step: int) -> dict[str, RowScores]:
        """What is known of these rows and young enough in optimizer step ``step``."""
        young = ((name, *self._found[name]) for name in ids if name in self._found)
        return {name: scores for name, scored, scores in young if step - scored <= self._steps}

    def remember(self, scores: dict[str, RowScores], step: int) -> None:
        """Takes in what step ``step`` found, and forgets what is too old to be used again."""
        if self._steps == 0:
            return
        self._found |= {name: (step, found) for name, found in scores.items()}
        self._found = {name: entry for name, entry in self._found.items() if step - entry[0] < self._steps}

    def clear(self) -> None:
        """Forgets everything."""
        self._found.clear()

    def save(self, folder: Path) -> None:
        """Writes ``selection.safetensors``; no file if there is nothing to remember."""
        if not self._found:
            return
        ids = sorted(self._found)
        entries = [self._found[name] for name in ids]
        first = entries[0][1]
        tensors = {
            "ids": np.frombuffer(bytes.fromhex("".join(ids)), dtype=np.uint8).reshape(len(ids), -1).copy(),
            "steps": np.array([step for step, _ in entries], dtype=np.int64),
            "sizes": np.array([len(scores.tokens["nll"]) for _, scores in entries], dtype=np.int64),
        }
        tensors |= {
            f"tokens.{name}": np.concatenate([scores.tokens[name] for _, scores in entries]) for name in first.tokens
        }
        tensors |= {f"rows.{name}": np.array([scores.rows[name] for _, scores in entries]) for name in first.rows}
        save_file(tensors, folder / MEMORY_FILE)

    def load(self, folder: Path) -> None:
        """Replaces everything by what a checkpoint holds: nothing, if it has no such file."""
        self.clear()
        if not (folder / MEMORY_FILE).exists():
            return
        tensors = load_file(folder / MEMORY_FILE)
        cuts = np.cumsum(tensors["sizes"])[:-1]
        tokens = {
            name.removeprefix("tokens."): np.split(column, cuts)
            for name, column in tensors.items()
            if name.startswith("tokens.")
        }
        rows = {name.removeprefix("rows."): column for name, column in tensors.items() if name.startswith("rows.")}
        for number, (name, step) in enumerate(zip(tensors["ids"], tensors["steps"])):
            scores = RowScores(
                {column: parts[number] for column, parts in tokens.items()},
                {column: float(values[number]) for column, values in rows.items()},
            )
            self._found[name.tobytes().hex()] = (int(step), scores)
