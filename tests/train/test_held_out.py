"""Rows that are held out from the adapters: the mask's own steps run on them, and no other step does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prunetune.config.schema import SelectionConfig, TrainSection
from prunetune.core.errors import ConfigError
from prunetune.pipeline.steps import run_steps
from prunetune.train.held_out import HeldOutRows
from prunetune.train.trainer import JointTrainer
from tests.train.joint_runs import (
    FREEZE_STEP,
    ROWS,
    STEPS,
    checkpoints,
    joint_trainer,
    prune_config,
    require_same,
    rows,
    weights,
)

PRUNE = prune_config({"method": "atp", "alternate": True, "held_out": "20%"})


class Watching(JointTrainer):
    """Keeps the rows that every step's forward passes see."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.seen: dict[int, set[tuple[int, ...]]] = {}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()):
                row = tuple(token for token, real in zip(ids, mask) if real)
                self.seen.setdefault(self.state.global_step, set()).add(row)
        return super().compute_loss(model, inputs, *args, **kwargs)


def contents(dataset: Any) -> set[tuple[int, ...]]:
    return {tuple(row["input_ids"]) for row in dataset}


@pytest.mark.parametrize("select", [None, "infobatch"])
def test_the_network_learns_from_them_and_nothing_else_does(tmp_path: Path, select: str | None) -> None:
    args: dict[str, Any] = {"args": {"save_steps": 1, "max_steps": 2 * STEPS}, "kind": Watching}
    if select:
        args["select"] = SelectionConfig.model_validate({"samples": select})
    trainer = joint_trainer(tmp_path, prune=PRUNE, **args)
    held, own = contents(trainer._held_out._rows), contents(trainer.train_dataset)
    assert len(held) == 0.2 * ROWS
    assert not held & own
    assert held | own == contents(joint_trainer(tmp_path / "whole").train_dataset)
    trainer.train()
    on_held = [step for step, seen in sorted(trainer.seen.items()) if seen <= held]
    assert on_held == [2, 4, 6], "every other step of the search [2, 8)"
    assert all(not seen & held for step, seen in trainer.seen.items() if step not in on_held)


def test_nothing_is_chosen_of_rows_that_are_not_trained_on(tmp_path: Path) -> None:
    select = SelectionConfig.model_validate({"samples": {"method": "loss", "kept": "50%"}})
    trainer = joint_trainer(tmp_path, prune=PRUNE, select=select, args={"max_steps": 2 * STEPS}, kind=Watching)
    trainer.train()
    lines = (tmp_path / "selection.jsonl").read_text().splitlines()
    chosen = {json.loads(line)["step"] for line in lines}
    # Recorded as the Trainer counts, from 1: the mask's own steps are 3, 5 and 7.
    assert chosen == set(range(1, 2 * STEPS + 1)) - {3, 5, 7}


def test_steps_are_counted_without_them() -> None:
    train = TrainSection(batch_size=4, accumulate=1, epochs=1)
    assert run_steps(train, PRUNE, ROWS) == 4
    assert run_steps(train, prune_config(), ROWS) == run_steps(train, None, ROWS) == 5


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = joint_trainer(tmp_path / "whole", prune=PRUNE, args={"save_steps": 1})
    whole.train()
    for step in (1, 2, FREEZE_STEP - 1):
        folder = tmp_path / f"from {step}"
        shutil.copytree(tmp_path / "whole", folder)
        shutil.rmtree(folder / "freeze")
        for later in checkpoints(folder):
            if later > step:
                shutil.rmtree(folder / f"checkpoint-{later}")
        resumed = joint_trainer(folder, prune=PRUNE, args={"save_steps": 1})
        resumed.train(resume_from_checkpoint=True)
        require_same(weights(resumed), weights(whole))


@pytest.mark.parametrize("world", [1, 3])
def test_processes_take_different_rows_and_steps_do_too(world: int) -> None:
    def batches(rank: int, step: int) -> list[list[int]]:
        trainer = SimpleNamespace(
            train_dataset=rows(40).add_column("number", list(range(40))),
            args=SimpleNamespace(per_device_train_batch_size=2),
            accelerator=SimpleNamespace(num_processes=world, process_index=rank),
            data_collator=lambda examples: [example["number"] for example in examples],
        )
        return HeldOutRows(trainer, 0.5, seed=3).batches(step, 2)  # type: ignore[return-value]

    everyone = [number for rank in range(world) for batch in batches(rank, 0) for number in batch]
    assert len(everyone) == len(set(everyone)) == 4 * world
    assert batches(0, 0) != batches(0, 1)
    assert batches(0, 0) == batches(0, 0)


def test_streamed_and_single_rows_are_refused(tmp_path: Path) -> None:
    for few in (rows().to_iterable_dataset(), rows(1)):
        with pytest.raises(ConfigError, match=r"mask\.alternate: false"):
            joint_trainer(tmp_path, prune=PRUNE.model_copy(), train_dataset=few)
