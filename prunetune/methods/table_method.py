"""What sample and token methods are: pure functions of one table of statistics, each a file with its own options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from prunetune.methods.options import MethodOptions
from prunetune.model.score_table import ScoreTable


class TableMethod(ABC):
    """A method that ranks rows or tokens of a table.

    Args:
        options: the method's own options.
        seed: of the run; only methods that draw by lot use it, through ``core.streams``.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    paper: ClassVar[str] = ""
    # Columns of the table that it reads, and whether it can work on the rows of one step (online).
    needs: ClassVar[frozenset[str]] = frozenset()
    online: ClassVar[bool] = True

    def __init__(self, options: MethodOptions, seed: int = 0):
        self.options = options
        self.seed = seed

    @abstractmethod
    def scores(self, table: ScoreTable) -> np.ndarray:
        """Float64, one a row or a token; higher is kept first."""
