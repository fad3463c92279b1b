"""When the warm-up is over, legal shapes are tried on training rows, and the best is what the model is cut to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunetune.config.schema import PhaseConfig, SelectionConfig
from prunetune.model.budget import Shape, plan_shape
from prunetune.model.plan import Plan
from prunetune.model.surgery import slice_model
from prunetune.train import freezing, shape_trial
from prunetune.train.calibration import drawn_rows
from prunetune.train.selection_rows import Row
from prunetune.train.trainer import JointTrainer
from tests.train.joint_runs import checkpoints, joint_trainer, prune_config, require_same, rows, weights

WARMUP_END = 1


class Watching(JointTrainer):
    """Keeps what was tried, and the model as it was then."""

    tried: tuple[list[Plan], list[float]] | None = None
    copied: Any = None

    def _try_shapes(self, search: Any, step: int) -> None:
        found = freezing.trial_losses

        def watch(trainer: Any, gates: Any, planner: Any, plans: list[Plan], seed: int) -> list[float]:
            assert self.tried is None
            self.copied = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            losses = found(trainer, gates, planner, plans, seed)
            self.tried = (plans, losses)
            return losses

        freezing.trial_losses = watch
        try:
            super()._try_shapes(search, step)
        finally:
            freezing.trial_losses = found


def trainer_of(folder: Path, **kwargs: Any) -> Watching:
    trainer = joint_trainer(folder, kind=Watching, **kwargs)
    assert isinstance(trainer, Watching)
    return trainer


def test_losses_are_those_of_the_sliced_models_on_the_same_rows_and_the_least_wins(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, args={"save_steps": 1})
    trainer.train()
    assert trainer.tried is not None
    plans, losses = trainer.tried
    shapes = [plan_shape(trainer.dense, plan) for plan in plans]
    assert len(set(shapes)) == len(shapes) > 1
    assert set(shapes) <= set(trainer.planner.candidates)
    assert trainer.shape == shapes[losses.index(min(losses))]
    chosen = drawn_rows(trainer, shape_trial.TOKENS, 0, "shape trial")
    for plan, loss in zip(plans, losses):
        sliced = joint_trainer(tmp_path / "other")
        with torch.no_grad():
            for name, parameter in sliced.model.named_parameters():
                parameter.copy_(trainer.copied[name])
        slice_model(sliced.model, plan)
        sliced.model.eval()
        assert loss == pytest.approx(mean_loss(sliced, chosen), rel=1e-5)


@torch.no_grad()
def mean_loss(trainer: Any, examples: list[Any]) -> float:
    """Of the target tokens of different rows, one row at a time, by the model's own forward pass."""
    total, count = 0.0, 0
    for example in {str(example["input_ids"]): example for example in examples}.values():
        batch = trainer.data_collator([example])
        targets = int((batch["labels"][:, 1:] != -100).sum())
        total += targets * float(trainer.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss)
        count += targets
    return total / count


def test_the_worse_scored_shape_can_win_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial decides, not the scores: with made-up losses the last shape wins and is what is exported."""
    shapes: list[Shape] = []

    def reverse(trainer: Any, gates: Any, planner: Any, plans: list[Plan], seed: int) -> list[float]:
        shapes.extend(plan_shape(planner.arch, plan) for plan in plans)
        return [-float(number) for number in range(len(plans))]

    monkeypatch.setattr(freezing, "trial_losses", reverse)
    trainer = joint_trainer(tmp_path)
    trainer.train()
    assert trainer.shape == shapes[-1] != shapes[0]


def test_losses_that_are_not_finite_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Shape] = []

    def broken(trainer: Any, gates: Any, planner: Any, plans: list[Plan], seed: int) -> list[float]:
        shapes.extend(plan_shape(planner.arch, plan) for plan in plans)
        return [float("nan"), *(float(number) for number in range(1, len(plans)))]

    monkeypatch.setattr(freezing, "trial_losses", broken)
    trainer = joint_trainer(tmp_path)
    trainer.train()
    assert trainer.shape == shapes[1]


@pytest.mark.parametrize(
    "prune",
    [
        prune_config({"method": "saliency", "shape": "scored"}),
        prune_config(phases=PhaseConfig(warmup=0.0, search=0.5)),
        prune_config("hard_concrete"),
        prune_config(units=("mlp_channels",)),
    ],
    ids=["scored", "no warm-up", "a mask with widths of its own", "one legal shape"],
)
def test_nothing_is_tried(tmp_path: Path, prune: Any) -> None:
    trainer = trainer_of(tmp_path, prune=prune)
    trainer.train()
    assert trainer.tried is None
    assert trainer.plan is not None


def test_streamed_rows_are_said_not_to_allow_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_of(tmp_path, train_dataset=rows().to_iterable_dataset())
    trainer.train()
    assert trainer.tried is None
    assert "streamed rows do not allow" in " ".join(capsys.readouterr().out.split())


def test_rows_without_targets_are_said_not_to_allow_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = Row(np.arange(4), np.full(4, -100))
    monkeypatch.setattr(shape_trial, "rows_of", lambda batch: [blank])
    joint_trainer(tmp_path).train()
    assert "the rows that were drawn have no target tokens" in " ".join(capsys.readouterr().out.split())


def test_random_states_are_left_alone(tmp_path: Path) -> None:
    """Up to the search's first gates a run with a trial is one without, dropout included."""
    runs = []
    for shape in ("tried", "scored"):
        trainer = joint_trainer(
            tmp_path / shape,
            prune=prune_config({"method": "random", "shape": shape}, units=("mlp_channels", "kv_groups"), kept="100%"),
            args={"save_steps": 1},
        )
        trainer.train()
        runs.append(weights(trainer))
    require_same(*runs)


@pytest.mark.parametrize("mask", ["saliency", "gradual_zero"])
def test_resumed_before_and_after_the_trial(tmp_path: Path, mask: str) -> None:
    whole = joint_trainer(tmp_path / "whole", prune=prune_config(mask), args={"save_steps": 1})
    whole.train()
    for step in (WARMUP_END, WARMUP_END + 1):
        folder = tmp_path / f"from {step}"
        shutil.copytree(tmp_path / "whole", folder)
        shutil.rmtree(folder / "freeze")
        for later in checkpoints(folder):
            if later > step:
                shutil.rmtree(folder / f"checkpoint-{later}")
        resumed = trainer_of(folder, prune=prune_config(mask), args={"save_steps": 1})
        resumed.train(resume_from_checkpoint=True)
        assert (resumed.tried is not None) == (step == WARMUP_END)
        require_same(weights(resumed), weights(whole))


def test_it_comes_once_where_rows_are_chosen_online(tmp_path: Path) -> None:
    """Rows are scored with the step's gates, which are then asked for twice."""
    select = SelectionConfig.model_validate({"samples": {"method": "loss", "kept": "50%"}})
    trainer = trainer_of(tmp_path, select=select)
    trainer.train()
    assert trainer.tried is not None
