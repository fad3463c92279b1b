"""What goes wrong when rows and tokens are chosen while training, and what cannot be combined with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunetune.core.errors import ConfigError, DataError, DivergedError
from prunetune.train.selection_rows import Row
from prunetune.train.selection_scoring import Scorer
from tests.support import tiny_model
from tests.train.joint_runs import metrics, rows
from tests.train.selecting_runs import decisions, plain_trainer, select

Q_TUNING = {"method": "q_tuning", "kept": "50%"}
NEIGHBOURS = {"method": "neighbour_perplexity", "kept": "70%"}

# ---- rows that cannot be judged


def poison(monkeypatch: pytest.MonkeyPatch, spoilt: Any) -> None:
    """Makes the statistics of some rows NaN."""
    score = Scorer.score

    def scoring(self: Scorer, rows: list[Row], most_tokens: int) -> Any:
        found = score(self, rows, most_tokens)
        for name in filter(spoilt, sorted(found)):
            found[name].tokens["nll"][:] = np.nan
        return found

    monkeypatch.setattr(Scorer, "score", scoring)


@pytest.mark.parametrize("chosen", [select(Q_TUNING), select("loss", NEIGHBOURS), select(None, NEIGHBOURS)])
def test_rows_with_bad_scores_are_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: Any) -> None:
    poison(monkeypatch, lambda name: int(name, 16) % 3 == 0)
    plain_trainer(tmp_path / "run", chosen, args={"max_steps": 5}).train()
    lines = decisions(tmp_path / "run")
    bad = [row for line in lines for row in line["dropped"] if row[1] == "bad_score"]
    assert bad
    assert all(int(row[0], 16) % 3 == 0 for row in bad)
    assert not any(int(row[0], 16) % 3 == 0 for line in lines for row in line["kept"])


def test_step_of_bad_rows_alone_keeps_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda name: True)
    plain_trainer(tmp_path / "run", select(Q_TUNING, NEIGHBOURS), args={"max_steps": 2}).train()
    for line in decisions(tmp_path / "run"):
        assert [reason for _, reason, _ in line["kept"]] == ["floor"]
        assert [reason for _, reason, _ in line["dropped"]] == 3 * ["bad_score"]


def test_model_that_became_nan_still_stops_the_run(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path / "run", select(Q_TUNING, NEIGHBOURS))
    with torch.no_grad():
        trainer.model.get_base_model().model.norm.weight.fill_(float("nan"))
    with pytest.raises(DivergedError):
        trainer.train()


def test_budget_that_would_drop_every_token_keeps_each_rows_floor(tmp_path: Path) -> None:
    chosen = select(None, {"method": "loss", "kept": "0.001%", "floor": 0.0})
    trainer = plain_trainer(tmp_path / "run", chosen, args={"max_steps": 3})
    trainer.train()
    for line in decisions(tmp_path / "run"):
        assert line["target_tokens"][0] == 4, "one of each row, its end of turn"
    assert all(np.isfinite(entry["grad_norm"]) for entry in metrics(tmp_path / "run") if "loss" in entry)


def test_copies_of_a_row_share_its_fate(tmp_path: Path) -> None:
    from datasets import concatenate_datasets

    few = rows(2)
    args = {"per_device_train_batch_size": 4, "max_steps": 2}
    chosen = select({"method": "loss", "kept": "50%"})
    plain_trainer(tmp_path / "run", chosen, train_dataset=concatenate_datasets([few, few]), args=args).train()
    assert all(line["rows"] == [1, 2] for line in decisions(tmp_path / "run"))


# ---- what is refused


@pytest.mark.parametrize(
    ("chosen", "args", "field"),
    [
        (select("loss"), {"packing": True, "max_length": 24}, "packing"),
        (select("loss"), {"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        (select("infobatch"), {"loss_type": "dft"}, "data.samples.weighted"),
        (select("less"), {}, "data.samples.method"),
        (select("no_such"), {}, "data.samples.method"),
        (select(None, "paragraph_surprisal"), {}, "data.tokens.method"),
        (select({"kept": "50%"}), {}, "data.samples.kept"),
        (select("infobatch", "loss"), {}, "data.samples.weighted"),
        (select({"method": "q_tuning", "mode": "wild"}), {}, "data.samples.mode"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(tmp_path: Path, chosen: Any, args: Any, field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plain_trainer(tmp_path / "run", chosen, args=args)
    assert [problem.field for problem in refused.value.problems] == [field]
    assert len(refused.value.problems[0].message) > 20


def test_reference_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without its adapters"):
        plain_trainer(tmp_path / "run", select(None, "excess_loss"), peft_config=None)


def test_gradient_norms_of_capped_logits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="capped logits"):
        plain_trainer(tmp_path / "run", select("donod"), model=tiny_model("gemma2"))


def test_streamed_rows_choose_in_every_step_but_have_no_epochs(tmp_path: Path) -> None:
    streamed = rows(40).to_iterable_dataset()
    plain_trainer(tmp_path / "run", select(Q_TUNING), train_dataset=streamed, args={"max_steps": 3}).train()
    assert [line["rows"] for line in decisions(tmp_path / "run")] == 3 * [[2, 4]]
    with pytest.raises(ConfigError, match="streamed rows have no epochs"):
        plain_trainer(tmp_path / "other", select("infobatch"), train_dataset=streamed)


def test_collator_with_more_than_text_is_refused(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path / "run", select(Q_TUNING))
    plain = trainer.data_collator
    trainer.data_collator = lambda examples: {**plain(examples), "pixel_values": torch.zeros(1)}
    with pytest.raises(DataError, match="also returns pixel_values"):
        trainer.train()


def test_collator_that_makes_its_own_labels_is_refused(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path / "run", select(None, NEIGHBOURS))
    plain = trainer.data_collator

    def relabel(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = plain(examples)
        return {**batch, "labels": batch["input_ids"].clone()}

    trainer.data_collator = relabel
    with pytest.raises(DataError, match="keeps the rows' labels"):
        trainer.train()
