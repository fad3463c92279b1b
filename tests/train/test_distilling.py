"""Distillation from the open model: the mixed loss by hand, only in the search, off to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunetune.core.errors import ConfigError
from prunetune.model.surgery import base_model
from tests.support import tiny_model
from tests.train.joint_runs import (
    FREEZE_STEP,
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

SEARCH = range(2, FREEZE_STEP + 1)  # logged step numbers: warm-up is the first


def run(out: Path, distill: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    prune = prune_config(kwargs.pop("mask", "saliency"), distill=distill or {})
    trainer = joint_trainer(out, prune=prune, **kwargs)
    trainer.train()
    return trainer


def test_without_weight_nothing_changes(tmp_path: Path) -> None:
    plain, off = run(tmp_path / "plain"), run(tmp_path / "off", {"weight": 0.0, "temperature": 3.0})
    require_same(weights(off), weights(plain))
    assert timeless(metrics(tmp_path / "off")) == timeless(metrics(tmp_path / "plain"))
    assert not any("distill_kl" in entry for entry in metrics(tmp_path / "off"))


def test_it_distils_in_the_search_alone(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", {"weight": 0.5}, peft_config=lora(lora_dropout=0.0))
    found = {entry["step"]: entry["distill_kl"] for entry in metrics(tmp_path / "run") if "distill_kl" in entry}
    assert sorted(found) == list(SEARCH)
    assert found[2] < 1e-6 < found[FREEZE_STEP], "gates begin to close after the first step of the search"
    assert trainer.plan is not None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_mixed_loss_and_its_gradient_by_hand(tmp_path: Path, accumulate: int) -> None:
    """A step of the search on whole logits: (1 - w) CE + w KL over the step's target tokens."""
    seen: dict[str, Any] = {}
    peft = lora(lora_dropout=0.0)
    args = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    args |= {"max_grad_norm": 0.0, "max_steps": 8}
    trainer = joint_trainer(
        tmp_path / "run", prune=prune_config(distill={"weight": 0.3, "temperature": 2.0}), peft_config=peft, args=args
    )
    batches: list[dict[str, torch.Tensor]] = []
    compute = trainer.compute_loss

    def remember(model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 3:
            batches.append({key: inputs[key].clone() for key in ("input_ids", "attention_mask", "labels")})
        return compute(model, inputs, *rest, **kwargs)

    before_step = trainer.before_optimizer_step

    def compare(step: int) -> None:
        if step == 3:
            seen["found"] = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
            seen["gates"] = {name: gate.clone() for name, gate in trainer._search.gate_set.values().items()}
            seen["expected"], seen["loss"] = by_hand(trainer, batches)
        before_step(step)

    trainer.compute_loss, trainer.before_optimizer_step = remember, compare
    trainer.train()
    assert any(bool((gate < 1).any()) for gate in seen["gates"].values())
    for name, grad in seen["found"].items():
        torch.testing.assert_close(grad, seen["expected"][name], rtol=2e-3, atol=1e-6, msg=name)
    [logged] = [entry["loss"] for entry in metrics(tmp_path / "run") if entry["step"] == 4 and "loss" in entry]
    assert logged == pytest.approx(seen["loss"], rel=1e-3)


def by_hand(trainer: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], float]:
    """The gradient of the mixed loss over these micro-batches, through stock logits."""
    causal, gates = base_model(trainer.model), trainer._search.gate_set
    kept = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    gate_grads = {name: value.grad for name, value in gates._values.items()}
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        call = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad(), gates.opened():
            teacher = causal(**call).logits[:, :-1]
        student, labels = causal(**call).logits[:, :-1], batch["labels"][:, 1:]
        mask = labels != -100
        logp, logq = (teacher[mask] / 2).log_softmax(-1), (student[mask] / 2).log_softmax(-1)
        kl = 4 * nn.functional.kl_div(logq, logp, log_target=True, reduction="sum")
        total = total + 0.7 * nn.functional.cross_entropy(student[mask], labels[mask], reduction="sum") + 0.3 * kl
    parameters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total / tokens, list(parameters.values()))
    for name, parameter in parameters.items():
        parameter.grad = kept[name]
    for name, value in gates._values.items():
        value.grad = gate_grads[name]
    return dict(zip(parameters, grads)), float(total) / tokens


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, checkpointing: bool) -> None:
    args = {"gradient_checkpointing": checkpointing}
    whole = run(tmp_path / "run", {"weight": 0.5}, mask="hard_concrete", args=args)
    shutil.rmtree(tmp_path / "run" / "freeze")
    for later in checkpoints(tmp_path / "run"):
        if later > 2:
            shutil.rmtree(tmp_path / "run" / f"checkpoint-{later}")
    prune = prune_config("hard_concrete", distill={"weight": 0.5})
    resumed = joint_trainer(tmp_path / "run", prune=prune, args=args)
    resumed.train(resume_from_checkpoint=True)
    require_same(weights(resumed), weights(whole))


def test_packed_rows_are_distilled_too(tmp_path: Path) -> None:
    args = {"packing": True, "packing_strategy": "bfd", "max_length": 24, "per_device_train_batch_size": 2}
    run(tmp_path / "run", {"weight": 0.5}, args=args, train_dataset=rows(40))
    assert sum("distill_kl" in entry for entry in metrics(tmp_path / "run")) == len(SEARCH)


def test_softcapped_logits_are_distilled(tmp_path: Path) -> None:
    run(tmp_path / "run", {"weight": 1.0}, model=tiny_model("gemma2"))
    assert metrics(tmp_path / "run")[FREEZE_STEP - 1]["distill_kl"] > 0


@pytest.mark.parametrize("args", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_other_losses_are_refused(tmp_path: Path, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"distill.weight.*plain loss"):
        joint_trainer(tmp_path / "run", prune=prune_config(distill={"weight": 0.5}), args=args)
