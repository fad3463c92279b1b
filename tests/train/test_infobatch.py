"""InfoBatch: which rows it leaves out, that weights make up for them exactly, and where its losses come from."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trl import SFTTrainer

from prunetune.config.schema import DistillConfig, PhaseConfig
from prunetune.methods.samples import build_samples
from prunetune.model.score_table import ScoreTable
from prunetune.train.selecting import SelectingTrainer
from prunetune.train.selection_epoch import EpochLosses
from tests.train.joint_runs import joint_trainer, prune_config, rows
from tests.train.selecting_runs import decisions, plain_trainer, select


def table_of(losses: Any) -> ScoreTable:
    """Rows with these mean losses, two tokens each."""
    losses = np.asarray(losses, dtype=np.float64)
    nll = np.stack([losses - 0.25, losses + 0.25], axis=1).ravel()
    return ScoreTable([f"{i:03d}" for i in range(len(losses))], 2 * np.arange(len(losses) + 1), {}, {"nll": nll})


def test_only_rows_below_the_mean_are_left_out_and_so_many() -> None:
    losses = [1.0, 2, 3, 4, 5, 6, 7, 28]  # mean 7: the row at the mean is not below it
    for prune, left in ((0.5, 3), (0.25, 4), (0.9, 1), (0.0001, 5)):
        choice = build_samples("infobatch", {"prune": prune}).choose(table_of(losses), 8)
        assert choice.keep[6:].all()
        assert choice.keep[:6].sum() == left
        assert choice.threshold == pytest.approx(7.0)
        assert choice.weight is not None
        assert choice.weight[choice.keep] == pytest.approx([6 / left] * left + [1.0, 1.0])
        assert choice.weight[choice.keep].sum() == pytest.approx(8), "the kept rows stand for all"


def test_expectation_over_the_draw_is_the_sum_of_all_losses() -> None:
    losses = np.random.default_rng(0).lognormal(size=9)
    table, sums = table_of(losses), []
    for seed in range(4000):
        choice = build_samples("infobatch", {"prune": 0.6}, seed).choose(table, 9)
        assert choice.weight is not None
        sums.append(float((choice.weight * losses)[choice.keep].sum()))
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - losses.sum()) < 4 * error
    plain = [build_samples("infobatch", {"weighted": False}, seed).choose(table, 9).weight for seed in range(3)]
    assert all((weight == 1).all() for weight in plain)


def test_equal_losses_and_single_rows_stay_and_bad_ones_do_not() -> None:
    method = build_samples("infobatch", {})
    assert method.choose(table_of([2.0] * 5), 5).keep.all()
    assert method.choose(table_of([2.0]), 1).keep.all()
    noise = 2.0 + 1e-9 * np.random.default_rng(0).normal(size=6)
    assert method.choose(table_of(noise), 6).keep.all(), "rounding is no difference"
    mixed = method.choose(table_of([1.0, np.nan, 1e30]), 3)
    assert list(mixed.reason) == ["drawn", "bad_score", "above"]
    assert not method.choose(table_of([np.nan, np.inf]), 2).keep.any()


def test_order_of_the_rows_does_not_matter() -> None:
    table = table_of(np.random.default_rng(1).normal(3, 1, 20))
    index = np.random.default_rng(2).permutation(20)
    method = build_samples("infobatch", {}, 5)
    whole, shuffled = method.choose(table, 20), method.choose(table.pick(index), 20)
    assert np.array_equal(whole.keep[index], shuffled.keep)


# ---- in the trainer


@pytest.mark.parametrize("padding_free", [False, True])
def test_losses_are_those_of_the_training_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding_free: bool
) -> None:
    """One forward a micro-batch, and the table holds what scoring the same rows finds."""
    calls = 0
    plain = SFTTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    args: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.0, "per_device_train_batch_size": 2}
    args |= {"gradient_accumulation_steps": 2, "padding_free": padding_free, "max_length": None}
    trainer = plain_trainer(tmp_path / "run", select("infobatch"), train_dataset=rows(12), args=args)
    trainer.train()
    assert calls == 6
    table = trainer._losses
    assert table is not None
    table.flush()
    asked = plain_trainer(tmp_path / "asked", select("loss"), train_dataset=rows(12))
    from prunetune.train.selection_rows import rows_of

    batch = asked.data_collator([asked.train_dataset[i] for i in range(12)])
    scored = asked._scorer.score([rows_of(batch)], 1000)
    assert table._losses.keys() == scored.keys()
    for name, found in scored.items():
        assert table._losses[name] == pytest.approx(float(found.tokens["nll"].mean()), rel=1e-5)


def test_losses_are_the_models_also_where_it_distils(tmp_path: Path) -> None:
    """The loss that is trained with is then half a divergence, on another scale."""
    found = []
    for weight in (0.0, 0.9):
        prune = prune_config(distill=DistillConfig(weight=weight), phases=PhaseConfig(warmup=0.4, search=0.2))
        # The gates close after the search's first step, which both runs take with the same weights.
        args = {"max_steps": 5, "save_steps": 5}
        trainer = joint_trainer(tmp_path / str(weight), prune=prune, args=args, select=select("infobatch"))
        seen = []
        take = trainer._losses._take

        def watch(output: Any, rows: Any, take: Any = take, seen: list[Any] = seen, trainer: Any = trainer) -> Any:
            result = take(output, rows)
            seen.append((trainer.state.global_step, trainer._losses._seen[-1][1][0].tolist()))
            return result

        trainer._losses._take = watch
        trainer.train()
        found.append([losses for step, losses in seen if step <= 2])
    assert found[0] == found[1]


@pytest.mark.parametrize(("batch", "accumulate", "padding_free"), [(6, 1, False), (2, 3, False), (3, 2, True)])
def test_expected_gradient_is_that_of_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, accumulate: int, padding_free: bool
) -> None:
    """Over all draws of two of four rows below the mean, the mean gradient is the gradient on all six rows."""
    draws = itertools.cycle(itertools.combinations(range(4), 2))
    below: list[str] = []

    def drawn(self: EpochLosses, ids: Any, epoch: int) -> Any:
        from prunetune.train.selection_choice import RowChoice, StepChoice

        if not below:
            below.extend(sorted(ids)[:4])
        stay = {below[i] for i in next(draws)}
        chosen = {name: RowChoice(name in stay, "", weight=2.0 if name in stay else 1.0) for name in below}
        return StepChoice({name: chosen.get(name, RowChoice(True, "above")) for name in ids})

    monkeypatch.setattr(EpochLosses, "choose", drawn)
    gradients: list[dict[str, torch.Tensor]] = []
    before = SelectingTrainer._get_grad_norm

    def keep_gradients(self: Any, model: Any, grad_norm: Any = None) -> Any:
        parameters = self.model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})
        return before(self, model, grad_norm)

    monkeypatch.setattr(SelectingTrainer, "_get_grad_norm", keep_gradients)
    args: dict[str, Any] = {"max_steps": 6, "learning_rate": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.0}
    args |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    args |= {"padding_free": padding_free, "max_length": None, "seed": 3}
    data = rows(6)
    plain_trainer(tmp_path / "ours", select("infobatch"), train_dataset=data, args=args).train()
    assert all(line["rows"] == [4, 6] for line in decisions(tmp_path / "ours"))
    drawn_gradients, gradients[:] = list(gradients), []
    plain_trainer(tmp_path / "all", None, train_dataset=data, args={**args, "max_steps": 1}).train()
    [wanted] = gradients
    assert any(float((drawn_gradients[0][name] - wanted[name]).abs().max()) > 1e-4 for name in wanted)
    for name, gradient in wanted.items():
        mean = torch.stack([found[name] for found in drawn_gradients]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_chooses_once_an_epoch_after_the_first(tmp_path: Path) -> None:
    args = {"max_steps": 9, "save_steps": 100}
    plain_trainer(tmp_path / "run", select("infobatch"), train_dataset=rows(12), args=args).train()
    lines = decisions(tmp_path / "run")
    assert all(line["rows"] == [4, 4] for line in lines[:3]), "the first epoch sees every row"
    for epoch in (lines[3:6], lines[6:9]):
        assert len({line["threshold"] for line in epoch}) == 1
        dropped = [row for line in epoch for row in line["dropped"]]
        drawn = [row for line in epoch for row in line["kept"] if row[1] == "drawn"]
        assert len(drawn) == max(1, (len(drawn) + len(dropped)) // 2)
        assert all(row[2] < epoch[0]["threshold"] for row in [*dropped, *drawn])
        weight = (len(drawn) + len(dropped)) / len(drawn)
        assert [row[3] for row in drawn if len(row) > 3] == pytest.approx([weight] * len(drawn) if weight > 1 else [])
    assert lines[3]["threshold"] != lines[6]["threshold"]


def test_freeze_makes_it_start_over(tmp_path: Path) -> None:
    """12 rows in batches of 4: epochs begin at steps 1, 4 and 7; the freeze comes after step 4."""
    joint_trainer(tmp_path / "run", select=select("infobatch"), train_dataset=rows(12)).train()
    reasons = [{row[1] for row in [*line["kept"], *line["dropped"]]} for line in decisions(tmp_path / "run")]
    assert [seen == {"unseen"} for seen in reasons[:3]] == [True] * 3
    assert "unseen" not in reasons[3]
    assert reasons[4] == reasons[5] == {"unseen"}
    # Rows of steps 5 and 6 were seen by the small model, those of step 4 were not.
    assert sum("unseen" in seen for seen in reasons[6:]) >= 1
    assert any(seen - {"unseen"} for seen in reasons[6:])
