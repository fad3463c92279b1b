"""How a step's rows are batched, padded or recomputed changes neither losses, nor gate statistics, nor the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prunetune.model.gates import GateStatistics
from prunetune.train.trainer import JointTrainer
from tests.invariance.recording import record_statistics, require_close
from tests.train.joint_runs import FREEZE_STEP, joint_trainer, lora, prune_config, rows

ALL_UNITS = ("mlp_channels", "kv_groups", "query_heads", "layers")


def run(
    monkeypatch: pytest.MonkeyPatch, out: Path, mask: str = "saliency", **args: Any
) -> tuple[JointTrainer, list[GateStatistics]]:
    """A joint run without dropout over 24 rows, and what its gates saw."""
    with monkeypatch.context() as patch:
        seen = record_statistics(patch)
        prune = prune_config(mask, units=ALL_UNITS)
        dropless = lora(lora_dropout=0.0)
        trainer = joint_trainer(out, prune=prune, peft_config=dropless, train_dataset=rows(24), args=args)
        trainer.train()
    assert len(seen) == FREEZE_STEP
    return trainer, seen


def losses(trainer: JointTrainer) -> list[float]:
    """The losses of all steps."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def require_same_run(
    left: tuple[JointTrainer, list[GateStatistics]], right: tuple[JointTrainer, list[GateStatistics]]
) -> None:
    """Same losses and statistics to rounding, same plan."""
    (a, seen_a), (b, seen_b) = left, right
    assert losses(a) == pytest.approx(losses(b), rel=1e-5)
    require_close(seen_a, seen_b)
    assert a.plan is not None
    assert b.plan is not None
    assert a.plan.kept == b.plan.kept


def test_eight_micro_batches_equal_one_batch_of_eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = run(monkeypatch, tmp_path / "1x8", per_device_train_batch_size=8)
    eight = run(monkeypatch, tmp_path / "8x1", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    require_same_run(once, eight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    plain = run(monkeypatch, tmp_path / "plain")
    checkpointed = run(
        monkeypatch,
        tmp_path / "recomputed",
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert checkpointed[0].model.is_gradient_checkpointing
    require_same_run(plain, checkpointed)


def test_sampled_gates_are_the_same_when_activations_are_recomputed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, seen = run(monkeypatch, tmp_path / "plain", "hard_concrete")
    again, seen_again = run(monkeypatch, tmp_path / "recomputed", "hard_concrete", activation_checkpointing=True)
    assert losses(plain) == pytest.approx(losses(again), rel=1e-5)
    for a, b in zip(seen, seen_again):
        for name, grad in a.grad.items():
            assert (grad - b.grad[name]).abs().max() <= 1e-4 * grad.abs().max() + 1e-7, name
    assert plain.plan is not None
    assert again.plan is not None
    assert plain.plan.kept == again.plan.kept


def test_padding_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = run(monkeypatch, tmp_path / "tight")
    padded = run(monkeypatch, tmp_path / "padded", pad_to_multiple_of=32)
    require_same_run(tight, padded)


def test_padding_free_batches_give_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padded = run(monkeypatch, tmp_path / "padded")
    flat = run(monkeypatch, tmp_path / "flat", padding_free=True, max_length=None)
    assert flat[0].data_collator.padding_free
    require_same_run(padded, flat)
