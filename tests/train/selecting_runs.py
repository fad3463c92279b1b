"""Tiny runs that choose rows and tokens: the trainer, its decisions, what its micro-batches held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunetune.config.schema import SelectionConfig
from prunetune.train.trainer import JointTrainer
from tests.train.joint_runs import joint_trainer, lora


def select(samples: Any = None, tokens: Any = None, **online: Any) -> SelectionConfig:
    """A SelectionConfig from sections in their short or long form."""
    return SelectionConfig(samples=samples or {}, tokens=tokens or {}, online=online, seed=3)


def plain_trainer(out: Path, chosen: SelectionConfig | None, **kwargs: Any) -> JointTrainer:
    """A run without masks and dropout."""
    kwargs.setdefault("peft_config", lora(lora_dropout=0.0))
    kwargs.setdefault("prune", None)
    return joint_trainer(out, select=chosen, **kwargs)


def decisions(out: Path) -> list[dict[str, Any]]:
    """The lines of selection.jsonl."""
    return [json.loads(line) for line in (Path(out) / "selection.jsonl").read_text().splitlines()]


def kept_ids(out: Path) -> list[list[str]]:
    """The ids of the rows that were kept, step by step."""
    return [[row[0] for row in line["kept"]] for line in decisions(out)]


def losses(trainer: JointTrainer) -> list[float]:
    """The losses of all steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
