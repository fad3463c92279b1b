"""Rows and tokens chosen while training: what is trained on, what is remembered, what goes wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from trl import SFTTrainer

from prunetune.methods.online import COLUMNS
from prunetune.methods.samples import SAMPLES
from prunetune.methods.tokens import TOKENS
from prunetune.train.checkpoint import MEMORY_FILE
from prunetune.train.selecting import SelectingTrainer
from prunetune.train.selection_rows import Row
from prunetune.train.selection_scoring import Scorer
from tests.support import tiny_model
from tests.train.joint_runs import (
    FREEZE_STEP,
    STEPS,
    checkpoints,
    joint_trainer,
    lora,
    metrics,
    prune_config,
    require_same,
    rows,
    timeless,
    weights,
)
from tests.train.selecting_runs import decisions, kept_ids, plain_trainer, select

Q_TUNING = {"method": "q_tuning", "kept": "50%"}
NEIGHBOURS = {"method": "neighbour_perplexity", "kept": "70%"}


def seen_batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], float]]:
    """(micro-batch, tokens it is divided by) of all forward passes of training from now on."""
    seen: list[tuple[dict[str, Any], float]] = []
    plain = SFTTrainer.compute_loss

    def compute_loss(self: SFTTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            copied = {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}
            seen.append((copied, float(kwargs.get("num_items_in_batch", args[-1] if args else 0))))
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    return seen


# ---- what is trained on


def test_only_kept_rows_and_tokens_are_trained_on_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_batches(monkeypatch)
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3}
    trainer = plain_trainer(tmp_path / "run", select(Q_TUNING, NEIGHBOURS), train_dataset=rows(24), args=args)
    trainer.train()
    # Four of eight rows are two micro-batches of two: the other two cost nothing.
    assert len(seen) == 3 * 2
    for step, line in enumerate(decisions(tmp_path / "run")):
        batches = seen[2 * step : 2 * step + 2]
        assert line["rows"] == [4, 8]
        assert sum(len(batch["input_ids"]) for batch, _ in batches) == 4
        found = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch, _ in batches)
        assert found == line["target_tokens"][0] < line["target_tokens"][1]
        assert {count for _, count in batches} == {float(found)}
        assert sum(int(batch["attention_mask"].sum()) for batch, _ in batches) == line["forward_tokens"][0]
        assert all(bool(batch["attention_mask"].any(0).all()) for batch, _ in batches), "no column is all padding"


def test_run_equals_training_on_the_kept_rows_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joint run: gates, plan and adapters come from the kept data alone."""
    prune = prune_config()
    with monkeypatch.context() as patch:
        seen = seen_batches(patch)
        chosen = select({"method": "loss", "kept": "50%"}, {"method": "random", "kept": "60%"})
        ours = joint_trainer(tmp_path / "ours", prune=prune, peft_config=lora(lora_dropout=0.0), select=chosen)
        ours.train()
    assert len(seen) == STEPS

    def handed(self: SFTTrainer, iterator: Any, number: int, device: Any) -> Any:
        for _ in range(number):
            next(iterator)
        batch = {name: value.clone() for name, value in seen[self.state.global_step][0].items()}
        return [batch], (batch["labels"][:, 1:] != -100).sum()

    monkeypatch.setattr(SelectingTrainer, "get_batch_samples", handed)
    by_hand = joint_trainer(tmp_path / "hand", prune=prune, peft_config=lora(lora_dropout=0.0))
    by_hand.train()
    assert ours.plan == by_hand.plan
    require_same(weights(ours), weights(by_hand))


def test_dropped_token_contributes_no_gradient_and_leaves_other_logits_alone() -> None:
    model = get_peft_model(tiny_model(), lora(lora_dropout=0.0)).train()
    ids = torch.arange(5, 17)
    row = Row(ids.numpy(), np.concatenate([np.full(4, -100), ids[4:].numpy()]))
    kept = np.array([True, False, True, True, False, True, True, True])
    masked = torch.tensor(row.example(kept)["labels"])[None]
    with torch.no_grad():
        model.get_base_model().lm_head.weight.requires_grad_(False)

    def gradients(labels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(input_ids=ids[None]).logits
        nll = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:], reduction="none")
        model(input_ids=ids[None], labels=labels, num_items_in_batch=tokens).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return nll.detach(), found

    nll, found = gradients(masked, torch.tensor(int(kept.sum())))
    again, _ = gradients(torch.from_numpy(row.labels)[None], torch.tensor(8))
    assert torch.equal(nll, again), "the dropped tokens are still context"
    model.zero_grad()
    logits = model(input_ids=ids[None]).logits
    terms = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:], reduction="none")
    (terms[row.positions[kept] - 1].sum() / int(kept.sum())).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_warm_up_and_annealing_train_on_everything(tmp_path: Path) -> None:
    chosen = select({"method": "loss", "kept": "50%"}, warmup=0.25, anneal=0.125)
    plain_trainer(tmp_path / "run", chosen).train()
    assert [line["step"] for line in decisions(tmp_path / "run")] == [3, 4, 5, 6, 7]
    entries = [entry for entry in metrics(tmp_path / "run") if "loss" in entry]
    assert [entry.get("rows_kept") for entry in entries] == [None, None, 0.5, 0.5, 0.5, 0.5, 0.5, None]


def test_metrics_and_file_say_what_was_kept_and_why(tmp_path: Path) -> None:
    plain_trainer(tmp_path / "run", select(Q_TUNING, NEIGHBOURS)).train()
    entries = [entry for entry in metrics(tmp_path / "run") if "loss" in entry]
    for entry, line in zip(entries, decisions(tmp_path / "run"), strict=True):
        assert entry["step"] == line["step"]
        for name in ("rows", "target_tokens", "forward_tokens"):
            assert entry[f"{name}_kept"] == pytest.approx(line[name][0] / line[name][1])
        reasons = [reason for _, reason, _ in line["kept"]]
        assert set(reasons) <= {"Q2", "Q4", "topup"}
        assert entry["rows_topped_up"] == reasons.count("topup") / len(reasons)
        assert {reason for _, reason, _ in line["dropped"]} <= {"Q1", "Q3", "middle", "trimmed"}
        assert all(isinstance(value, float) for _, _, value in line["kept"])


def test_random_draws_anew_in_every_step(tmp_path: Path) -> None:
    args = {"per_device_train_batch_size": 8, "max_steps": 6}
    plain_trainer(
        tmp_path / "run", select({"method": "random", "kept": "25%"}), train_dataset=rows(8), args=args
    ).train()
    chosen = kept_ids(tmp_path / "run")
    assert len({tuple(ids) for ids in chosen}) > 3
    assert all(line["scored"] == 0 for line in decisions(tmp_path / "run")), "lots need no scoring pass"


def able(registry: Any) -> list[str]:
    """The methods that choose from a step's rows."""
    return [
        name
        for name, kind in registry.items()
        if kind.online and not getattr(kind, "removes", False) and kind.needs <= COLUMNS
    ]


@pytest.mark.parametrize("method", able(SAMPLES))
def test_every_online_sample_method_runs(tmp_path: Path, method: str) -> None:
    per_epoch = SAMPLES.get(method).per_epoch
    chosen = select({"method": method} if per_epoch else {"method": method, "kept": "50%"})
    trainer = plain_trainer(tmp_path / "run", chosen, args={"max_steps": 2})
    trainer.train()
    assert all(line["rows"] == [4 if per_epoch else 2, 4] for line in decisions(tmp_path / "run"))


@pytest.mark.parametrize("scope", ["all", "sample"])
@pytest.mark.parametrize("method", able(TOKENS))
def test_every_online_token_method_runs(tmp_path: Path, method: str, scope: str) -> None:
    chosen = select(None, {"method": method, "kept": "60%", "scope": scope})
    plain_trainer(tmp_path / "run", chosen, args={"max_steps": 2}).train()
    for line in decisions(tmp_path / "run"):
        kept, whole = line["target_tokens"]
        assert line["rows"] == [4, 4]
        assert 0.55 * whole <= kept <= 0.75 * whole


def test_end_of_turn_is_never_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_batches(monkeypatch)
    chosen = select(None, {"method": "random", "kept": "10%"})
    plain_trainer(tmp_path / "run", chosen, args={"max_steps": 3}).train()
    for batch, _ in seen:
        ends = batch["input_ids"] == 2
        assert int(ends.sum()) == 4
        assert bool((batch["labels"][ends] == 2).all())


# ---- scoring


def test_scoring_leaves_the_model_and_the_random_state_alone(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path / "run", select("q_tuning", "excess_loss"), peft_config=lora(lora_dropout=0.5))
    trainer.model.train()
    trainer.model.get_base_model().model.layers[1].eval()
    before = {name: module.training for name, module in trainer.model.named_modules()}
    state, row = torch.get_rng_state(), Row(np.arange(5, 15), np.arange(5, 15))
    first = trainer._scorer.score([[row]], 100)[row.id]
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in trainer.model.named_modules()} == before
    assert all(p.grad is None for p in trainer.model.parameters())
    again = trainer._scorer.score([[row]], 100)[row.id]
    assert all(np.array_equal(first.tokens[name], again.tokens[name]) for name in first.tokens), "dropout is off"


def test_reference_is_the_model_without_its_adapters(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path / "run", select(None, {"method": "excess_loss", "kept": "50%"}))
    row = Row(np.arange(5, 15), np.arange(5, 15))
    fresh = trainer._scorer.score([[row]], 100)[row.id].tokens
    assert np.array_equal(fresh["nll"], fresh["reference_nll"]), "new adapters change nothing"
    trainer.train()
    moved = trainer._scorer.score([[row]], 100)[row.id].tokens
    assert np.array_equal(moved["reference_nll"], fresh["nll"])
    assert not np.array_equal(moved["nll"], fresh["nll"])


def test_rows_are_scored_under_the_gates_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gates while scoring are those of the forward pass that follows."""
    seen: list[tuple[str, dict[str, torch.Tensor]]] = []
    score, plain = Scorer.score, SFTTrainer.compute_loss

    def note(trainer: Any, what: str) -> None:
        if trainer._search is not None:
            seen.append((what, {name: gate.clone() for name, gate in trainer._search.gate_set.values().items()}))

    def scoring(self: Scorer, *args: Any) -> Any:
        note(self._trainer, "score")
        return score(self, *args)

    def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            note(self, "train")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Scorer, "score", scoring)
    monkeypatch.setattr(SFTTrainer, "compute_loss", loss)
    prune = prune_config("hard_concrete")
    joint_trainer(tmp_path / "run", prune=prune, select=select(Q_TUNING), args={"eval_steps": 1}).train()
    assert [what for what, _ in seen] == FREEZE_STEP * ["score", "train"]
    for (_, before), (_, after) in zip(seen[::2], seen[1::2]):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(bool((gate != 1).any()) for gate in seen[-1][1].values()), "the gates did move"


# ---- what is remembered


def test_statistics_are_used_again_for_so_many_steps(tmp_path: Path) -> None:
    args = {"per_device_train_batch_size": 8, "max_steps": 7}
    plain_trainer(tmp_path / "run", select(Q_TUNING, rescore_after=2), train_dataset=rows(8), args=args).train()
    assert [line["scored"] for line in decisions(tmp_path / "run")] == [8, 0, 0, 8, 0, 0, 8]


def test_freeze_empties_the_table(tmp_path: Path) -> None:
    args = {"per_device_train_batch_size": 8, "save_steps": 1}
    chosen = select(Q_TUNING, rescore_after=100)
    trainer = joint_trainer(tmp_path / "run", select=chosen, train_dataset=rows(8), args=args)
    trainer.train()
    assert [line["scored"] for line in decisions(tmp_path / "run")] == [8, 0, 0, 0, 8, 0, 0, 0]
    assert (tmp_path / "run" / f"checkpoint-{FREEZE_STEP}" / MEMORY_FILE).exists()
    assert not (tmp_path / "run" / "freeze" / "checkpoint" / MEMORY_FILE).exists()


RESUMED = {
    "scored every step": select(Q_TUNING, NEIGHBOURS),
    "table": select(Q_TUNING, NEIGHBOURS, rescore_after=3),
    "lots": select({"method": "random", "kept": "50%"}, {"method": "random", "kept": "50%"}),
    "infobatch": select({"method": "infobatch", "prune": 0.7}),
    "infobatch and tokens": select({"method": "infobatch", "weighted": False}, NEIGHBOURS, rescore_after=3),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_chooses_and_learns_what_the_uninterrupted_run_does(tmp_path: Path, name: str) -> None:
    # 12 rows in batches of 4: epochs end at steps 3 and 6.
    settings: dict[str, Any] = {"select": RESUMED[name], "train_dataset": rows(12), "args": {"save_steps": 1}}
    whole = joint_trainer(tmp_path / "whole", **settings)
    whole.train()
    for step in (2, 3, 5, 7):
        copy = tmp_path / f"copy{step}"
        shutil.copytree(tmp_path / "whole", copy)
        for later in [later for later in checkpoints(copy) if later > step]:
            shutil.rmtree(copy / f"checkpoint-{later}")
        if step <= FREEZE_STEP:
            shutil.rmtree(copy / "freeze")
        with open(copy / "selection.jsonl", "a", encoding="utf-8") as file:
            file.write('{"step": 9, "ke')  # cut short by the kill
        resumed = joint_trainer(copy, **settings)
        resumed.train(resume_from_checkpoint=True)
        require_same(weights(resumed), weights(whole))
        assert decisions(copy) == decisions(tmp_path / "whole")
        assert timeless(metrics(copy)) == timeless(metrics(tmp_path / "whole"))


def test_second_run_of_a_trainer_starts_afresh(tmp_path: Path) -> None:
    args = {"per_device_train_batch_size": 8, "max_steps": 2}
    chosen = select(Q_TUNING, rescore_after=100)
    trainer = plain_trainer(tmp_path / "run", chosen, train_dataset=rows(8), args=args)
    trainer.train()
    trainer.train()
    assert [line["scored"] for line in decisions(tmp_path / "run")] == [8, 0]
