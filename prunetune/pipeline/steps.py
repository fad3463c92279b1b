"""How many optimizer steps a run takes."""

from __future__ import annotations

from prunetune.config.presets import total_steps
from prunetune.config.schema import PruneConfig, TrainSection
from prunetune.methods.masks import MASKS
from prunetune.train.held_out import held_out_count


def run_steps(train: TrainSection, prune: PruneConfig | None, rows: int, processes: int = 1) -> int:
    """Optimizer steps over ``rows`` unpacked training rows, less those that are held out for the mask.

    Args:
        prune: the joint settings; None: a plain LoRA run.
    """
    if prune is not None:
        rows -= held_out_count(MASKS.get(prune.mask.method).held_out(prune.mask.options()), rows)
    return total_steps(train, rows, processes)
