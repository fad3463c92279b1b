"""Training rows that the adapters never see: some steps of a mask's own learning run on them."""

from __future__ import annotations

from typing import Any

import numpy as np

from prunetune.core.errors import ConfigError, Problem
from prunetune.core.streams import stream


def held_out_count(share: float, rows: int) -> int:
    """How many of so many rows are set aside: at least one, if there is a share, and one stays."""
    return min(max(1, round(share * rows)), rows - 1) if share else 0


class HeldOutRows:
    """A part of the training rows, set aside by lot.

    Args:
        trainer: loses these rows; holds the collator and the process's rank.
        share: of the rows; at least one is set aside, and one stays. seed: of the run.

    Raises:
        ConfigError: the rows are streamed, or there is one only.
    """

    def __init__(self, trainer: Any, share: float, seed: int):
        rows = trainer.train_dataset
        if not hasattr(rows, "__len__") or len(rows) < 2:
            why = "holds rows out from the adapters, by lot, which takes at least two that are not streamed; load them"
            raise ConfigError([Problem(f"{why}, or set mask.alternate: false", "mask.alternate")])
        count = held_out_count(share, len(rows))
        order = stream(seed, "held-out rows").permutation(len(rows))
        self._trainer, self._seed = trainer, seed
        self._rows = rows.select(np.sort(order[:count]).tolist())
        trainer.train_dataset = rows.select(np.sort(order[count:]).tolist())

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, step: int, count: int) -> list[dict[str, Any]]:
        """This process's micro-batches of a step, other rows in every step.

        All processes' are different ones, where there are enough.

        Args:
            step: of the optimizer. count: micro-batches of each process.
        """
        args, accelerator = self._trainer.args, self._trainer.accelerator
        size, world = args.per_device_train_batch_size, accelerator.num_processes
        order = np.resize(stream(self._seed, "held-out rows", step).permutation(len(self)), count * world * size)
        first = range(accelerator.process_index * size, len(order), world * size)
        return [self._trainer.data_collator([self._rows[int(n)] for n in order[at : at + size]]) for at in first]
