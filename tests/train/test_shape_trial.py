"""When the warm-up is over, legal shapes are tried on training rows, and the best is what the model is cut to."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prunetune.config.schema import PhaseConfig, SelectionConfig
from prunetune.core.errors import DataError
from prunetune.core.files import read_json
from prunetune.methods.masks.saliency import SaliencyMask
from prunetune.model.budget import Shape, plan_shape
from prunetune.model.plan import Plan
from prunetune.model.surgery import slice_model
from prunetune.train import shape_trial
from prunetune.train.freeze import SCORES_FILE
from prunetune.train.selection_rows import Row
from prunetune.train.trainer import JointTrainer
from tests.train.joint_runs import checkpoints, joint_trainer, known_model, prune_config, require_same, rows, weights

WARMUP_END = 1


class Watching(JointTrainer):
    """Keeps what was tried, and the model as it was then."""

    tried: tuple[list[Plan], shape_trial.TrialLosses] | None = None
    copied: Any = None

    def _try_shapes(self, search: Any, step: int) -> None:
        found = shape_trial.trial_losses

        def watch(trainer: Any, gates: Any, planner: Any, plans: list[Plan], seed: int) -> shape_trial.TrialLosses:
            assert self.tried is None
            self.copied = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            losses = found(trainer, gates, planner, plans, seed)
            self.tried = (plans, losses)
            return losses

        shape_trial.trial_losses = watch
        try:
            super()._try_shapes(search, step)
        finally:
            shape_trial.trial_losses = found


def trainer_of(folder: Path, **kwargs: Any) -> Watching:
    trainer = joint_trainer(folder, kind=Watching, **kwargs)
    assert isinstance(trainer, Watching)
    return trainer


def test_losses_are_those_of_the_open_and_of_the_sliced_models_on_the_same_rows(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, args={"save_steps": 1})
    trainer.train()
    assert trainer.tried is not None
    plans, losses = trainer.tried
    shapes = [plan_shape(trainer.dense, plan) for plan in plans]
    assert len(set(shapes)) == len(shapes) > 1
    assert set(shapes) <= set(trainer.planner.candidates)
    chosen = list(shape_trial.drawn_rows(trainer, 0).values())
    assert losses.targets == sum(len(row.positions) for row in chosen)
    whole = Plan({}, trainer.dense.fingerprint(), {})
    for plan, loss in zip([whole, *plans], [losses.whole, *losses.plans]):
        sliced = joint_trainer(tmp_path / "other")
        with torch.no_grad():
            for name, parameter in sliced.model.named_parameters():
                parameter.copy_(trainer.copied[name])
        slice_model(sliced.model, plan)
        sliced.model.eval()
        assert loss == pytest.approx(mean_loss(sliced, chosen), rel=1e-5)


@torch.no_grad()
def mean_loss(trainer: Any, chosen: list[Row]) -> float:
    """Of the rows' target tokens, one row at a time, by the model's own forward pass."""
    total, count = 0.0, 0
    for row in chosen:
        ids, labels = (torch.from_numpy(values)[None] for values in (row.input_ids, row.labels))
        targets = int((labels[:, 1:] != -100).sum())
        total += targets * float(trainer.model(input_ids=ids, labels=labels).loss)
        count += targets
    return total / count


def test_the_worse_scored_shape_can_win_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial decides, not the scores: with made-up losses the last shape wins and is what is exported."""
    shapes: list[Shape] = []

    def reverse(trainer: Any, gates: Any, planner: Any, plans: list[Plan], seed: int) -> shape_trial.TrialLosses:
        shapes.extend(plan_shape(planner.arch, plan) for plan in plans)
        return shape_trial.TrialLosses(9, 0.0, tuple(-float(number) for number in range(len(plans))))

    monkeypatch.setattr(shape_trial, "trial_losses", reverse)
    trainer = joint_trainer(tmp_path)
    trainer.train()
    assert trainer.shape == shapes[-1] != shapes[0]


def test_losses_that_are_not_finite_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Shape] = []

    def broken(trainer: Any, gates: Any, planner: Any, plans: list[Plan], seed: int) -> shape_trial.TrialLosses:
        shapes.extend(plan_shape(planner.arch, plan) for plan in plans)
        return shape_trial.TrialLosses(9, 0.5, (float("nan"), *(0.1 * number for number in range(1, len(plans)))))

    monkeypatch.setattr(shape_trial, "trial_losses", broken)
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


def test_the_trial_itself_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout included: a run whose mask does not listen to the trial is one without, to the bit."""
    monkeypatch.setattr(SaliencyMask, "settle", lambda mask, plan: None)
    runs = []
    for shape in ("tried", "scored"):
        trainer = trainer_of(tmp_path / shape, prune=prune_config({"method": "saliency", "shape": shape}))
        trainer.train()
        assert (trainer.tried is not None) == (shape == "tried")
        runs.append(weights(trainer))
    require_same(*runs)


def test_shapes_that_say_nothing_are_left_to_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond half way from the whole model to guessing, the least loss is that by chance."""
    shapes: list[Shape] = []
    for over in (-0.01, 0.01):

        def middling(
            trainer: Any, gates: Any, planner: Any, plans: list[Plan], seed: int, over: float = over
        ) -> shape_trial.TrialLosses:
            shapes[:] = [plan_shape(planner.arch, plan) for plan in plans]
            middle = (2.0 + math.log(planner.arch.vocab_size)) / 2 + over
            return shape_trial.TrialLosses(9, 2.0, (9.0, middle, *(9.0 for _ in plans[2:])))

        monkeypatch.setattr(shape_trial, "trial_losses", middling)
        trainer = joint_trainer(tmp_path / str(over), prune=prune_config({"method": "apt"}))
        trainer.train()
        scored = joint_trainer(tmp_path / "scored", prune=prune_config({"method": "apt", "shape": "scored"}))
        scored.train()
        assert shapes[1] != scored.shape
        assert trainer.shape == (shapes[1] if over < 0 else scored.shape)


@pytest.mark.parametrize("mask", ["saliency", "apt"])
def test_a_model_that_knows_the_rows_settles_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mask: str
) -> None:
    trainer = trainer_of(tmp_path, model=known_model(), prune=prune_config(mask))
    trainer.train()
    assert trainer.tried is not None
    plans, losses = trainer.tried
    found = read_json(tmp_path / "shape_trial.json")
    assert found["shapes"] == {
        str(plan_shape(trainer.dense, plan)): loss for plan, loss in zip(plans, losses.plans, strict=True)
    }
    assert found["settled"] == min(found["shapes"], key=found["shapes"].get) == str(trainer.shape)
    assert (found["step"], found["targets"], found["whole"]) == (WARMUP_END, losses.targets, losses.whole)
    assert f"shapes tried on {losses.targets} targets" in " ".join(capsys.readouterr().out.split())


def the_last(losses: shape_trial.TrialLosses, vocab_size: int) -> int:
    """Instead of the best: a shape that the scores would not take."""
    return len(losses.plans) - 1


@pytest.mark.parametrize("mask", ["saliency", "apt"])
def test_resumed_before_and_after_the_trial(tmp_path: Path, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_trial.TrialLosses, "best", the_last)
    made = {"prune": prune_config(mask), "args": {"save_steps": 1}}
    whole = joint_trainer(tmp_path / "whole", model=known_model(), **made)
    whole.train()
    assert str(whole.shape) == list(read_json(tmp_path / "whole" / "shape_trial.json")["shapes"])[-1]
    for step in (WARMUP_END, WARMUP_END + 1):
        folder = cut_back(tmp_path / "whole", tmp_path / f"from {step}", step)
        resumed = trainer_of(folder, model=known_model(), **made)
        resumed.train(resume_from_checkpoint=True)
        assert (resumed.tried is not None) == (step == WARMUP_END)
        require_same(weights(resumed), weights(whole))


def cut_back(whole: Path, folder: Path, step: int) -> Path:
    """A copy of a run as it was after a step before the freeze."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "freeze")
    for later in checkpoints(folder):
        if later > step:
            shutil.rmtree(folder / f"checkpoint-{later}")
    return folder


def test_a_settled_shape_is_not_taken_to_another_target(tmp_path: Path) -> None:
    made: dict[str, Any] = {"args": {"save_steps": 1}}
    joint_trainer(tmp_path / "whole", model=known_model(), **made).train()
    folder = cut_back(tmp_path / "whole", tmp_path / "again", WARMUP_END + 1)
    other = joint_trainer(folder, model=known_model(), prune=prune_config(kept="40%"), **made)
    with pytest.raises(DataError, match=r"has settled on .* resume with the target that it was made with"):
        other.train(resume_from_checkpoint=True)


def test_cutting_again_by_the_same_scores_tries_shapes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_trial.TrialLosses, "best", the_last)
    whole = joint_trainer(tmp_path / "whole")
    whole.train()
    scores = load_file(tmp_path / "whole" / "freeze" / SCORES_FILE)
    for mask, same in (("saliency", True), ({"method": "saliency", "shape": "scored"}, False)):
        again = joint_trainer(tmp_path / f"again {same}", prune=prune_config(mask))
        again.cut_from_scores(scores)
        assert (again.shape == whole.shape) == same
        assert again.plan is not None
        assert again.plan.origin["method"] == "scores of an earlier search"


@pytest.mark.parametrize(("targets", "tokens"), [(20, 10**6), (10**6, 100), (10**6, 10**6)])
def test_rows_are_drawn_until_targets_or_tokens_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, targets: int, tokens: int
) -> None:
    monkeypatch.setattr(shape_trial, "TARGETS", targets)
    monkeypatch.setattr(shape_trial, "TOKENS", tokens)
    trainer = joint_trainer(tmp_path)
    chosen = list(shape_trial.drawn_rows(trainer, 0).values())
    if min(targets, tokens) == 10**6:
        assert len(chosen) == len({str(row["input_ids"]) for row in trainer.train_dataset})
        return
    for some, enough in ((chosen, True), (chosen[:-1], False)):
        drawn = sum(len(row.positions) for row in some), sum(len(row) for row in some)
        assert (drawn[0] >= targets or drawn[1] >= tokens) == enough


def test_it_comes_once_where_rows_are_chosen_online(tmp_path: Path) -> None:
    """Rows are scored with the step's gates, which are then asked for twice."""
    select = SelectionConfig.model_validate({"samples": {"method": "loss", "kept": "50%"}})
    trainer = trainer_of(tmp_path, select=select)
    trainer.train()
    assert trainer.tried is not None
