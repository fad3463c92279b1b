"""A judge that is asked only once about the same cut: another size asks about many of the same narrowed sites."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunetune.core.files import read_json, write_json
from prunetune.methods.judging import Judge, Kept


class RememberedJudge:
    """Answers from a file, and asks the real judge for what is not in it; it is not even made before.

    Args:
        make: the real judge. path: a JSON file that belongs to one model, dtype and set of rows.
    """

    def __init__(self, make: Callable[[], Judge], path: Path):
        self._make, self._path = make, path
        self._known: dict[str, Any] = read_json(path) if path.is_file() else {}

    @cached_property
    def _judge(self) -> Judge:
        return self._make()

    def divergence(self, kept: Kept, share: float = 1.0, *, symmetric: bool = False) -> float:
        """See Judge."""
        key = _key("divergence", kept, share, symmetric)
        return float(self._answer(key, lambda: self._judge.divergence(kept, share, symmetric=symmetric)))

    def block_change(self, kept: Kept) -> NDArray[np.float64]:
        """See Judge."""
        return np.array(self._answer(_key("block_change", kept), lambda: self._judge.block_change(kept).tolist()))

    def _answer(self, key: str, ask: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = ask()
            # What another process has found meanwhile stays.
            self._known |= read_json(self._path) if self._path.is_file() else {}
            write_json(self._path, self._known)
        return self._known[key]


def _key(question: str, kept: Kept, *more: Any) -> str:
    units = sorted((site, list(indices)) for site, indices in kept.items())
    return hashlib.sha256(json.dumps([question, units, *more]).encode()).hexdigest()[:24]
