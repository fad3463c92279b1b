"""What goes wrong in a run, or cannot be combined with it: each with a reason, and nothing lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback
from trl import SFTTrainer

from prunetune.core.errors import (
    BudgetError,
    ConfigError,
    DataError,
    DivergedError,
    PlanMismatchError,
    UnsupportedModelError,
)
from prunetune.model.plan import Plan
from prunetune.train.checkpoint import newest
from tests.support import random_plan, tiny_arch, tiny_model
from tests.train.joint_runs import (
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

# ---- losses that are not finite


def poison(monkeypatch: pytest.MonkeyPatch, step: int, kind: str) -> list[dict[str, torch.Tensor]]:
    """Makes the loss, or only its gradient, NaN in a step (counted from 1); remembers the weights before it."""
    before: list[dict[str, torch.Tensor]] = []
    plain = SFTTrainer.compute_loss

    class InfiniteGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * float("inf")

    def compute_loss(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        if self.model.training and self.state.global_step + 1 == step:
            before.append(weights(self))
            loss = InfiniteGradient.apply(loss) if kind == "gradient" else loss * float("nan")
        return loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    return before


@pytest.mark.parametrize(("kind", "what"), [("loss", "loss"), ("gradient", "loss's gradient")])
@pytest.mark.parametrize("step", [1, 3, 6])
def test_loss_that_is_not_finite_stops_before_it_does_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, what: str, step: int
) -> None:
    trainer = joint_trainer(tmp_path / "run")
    with monkeypatch.context() as patch:
        before = poison(patch, step, kind)
        last = {1: "no checkpoint had been written yet", 3: "checkpoint-2", 6: "freeze/checkpoint"}[step]
        with pytest.raises(DivergedError, match=rf"the {what} became NaN or infinite in step {step};.*{last}"):
            trainer.train()
    require_same(weights(trainer), before[0])
    assert all(bool(torch.isfinite(weight).all()) for weight in weights(trainer).values())
    if step > 1:
        # What was there is whole: without the poison the run goes on from it.
        resumed = joint_trainer(tmp_path / "run")
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 8


def test_nan_in_one_of_many_micro_batches_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 2, "loss")
    args = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    with pytest.raises(DivergedError, match="in step 2"):
        joint_trainer(tmp_path / "run", args=args).train()


# ---- Ctrl-C in the same process


class Interrupt(TrainerCallback):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step: int, times: int = 1):
        self.step, self.times = step, times

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.step = -1
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same run, never stopped."""
    torch.set_num_threads(1)
    trainer = joint_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return Path(trainer.args.output_dir), weights(trainer)


@pytest.mark.parametrize("step", [1, 3, 4, 5])
@pytest.mark.parametrize("same_trainer", [True, False])
def test_ctrl_c_saves_stops_and_can_be_gone_on_from(
    tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor]], step: int, same_trainer: bool
) -> None:
    before = signal.getsignal(signal.SIGINT)
    trainer = joint_trainer(tmp_path / "run", callbacks=[Interrupt(step)])
    with pytest.raises(KeyboardInterrupt, match=rf"stopped at step {step} of 8.*resume_from_checkpoint=True"):
        trainer.train()
    assert newest(tmp_path / "run", tmp_path / "run" / "freeze") == tmp_path / "run" / f"checkpoint-{step}"
    assert signal.getsignal(signal.SIGINT) is before, "Ctrl-C means what it meant before"
    if not same_trainer:
        trainer = joint_trainer(tmp_path / "run")
    trainer.train(resume_from_checkpoint=True)
    require_same(weights(trainer), whole[1])
    assert timeless(metrics(tmp_path / "run")) == timeless(metrics(whole[0]))


def test_ctrl_c_in_the_last_step_changes_nothing(tmp_path: Path, whole: tuple[Path, Any]) -> None:
    trainer = joint_trainer(tmp_path / "run", callbacks=[Interrupt(8)])
    assert trainer.train().global_step == 8
    require_same(weights(trainer), whole[1])


# ---- plans and budgets


def static(path: Path) -> dict[str, Any]:
    """The mask that follows a plan file."""
    return {"method": "static", "plan": path}


def test_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    random_plan(tiny_arch(num_hidden_layers=4)).save(tmp_path / "plan.json")
    trainer = joint_trainer(tmp_path / "run", prune=prune_config(static(tmp_path / "plan.json")))
    before = weights(trainer)
    with pytest.raises(PlanMismatchError):
        trainer.train()
    require_same(weights(trainer), before)
    assert checkpoints(tmp_path / "run") == []


def test_plan_that_keeps_more_than_the_target_is_refused(tmp_path: Path) -> None:
    Plan({}, tiny_arch().fingerprint()).save(tmp_path / "plan.json")
    with pytest.raises(BudgetError, match="more than the target"):
        joint_trainer(tmp_path / "run", prune=prune_config(static(tmp_path / "plan.json"))).train()


@pytest.mark.parametrize("kept", ["0%", "1%"])
def test_impossible_budget_is_refused_at_construction(tmp_path: Path, kept: str) -> None:
    with pytest.raises(BudgetError, match="cannot be met"):
        joint_trainer(tmp_path / "run", prune=prune_config(kept=kept))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- what cannot be combined

REFUSED: dict[str, dict[str, Any]] = {
    "optim": {"optim": "adafactor"},
    "load_best_model_at_end": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "save_only_model": {"save_only_model": True},
    "save_strategy": {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"},
    "torch_compile": {"torch_compile": True},
}


@pytest.mark.parametrize("field", REFUSED)
def test_trl_setting_that_cannot_be_combined_is_refused_by_name(tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        joint_trainer(tmp_path / "run", args=REFUSED[field], eval_dataset=rows(4))
    assert [problem.field for problem in refused.value.problems] == [field]
    assert refused.value.problems[0].message


def test_ready_made_optimizer_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), lora())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ConfigError, match=r"set args\.optim"):
        joint_trainer(tmp_path / "run", model=model, peft_config=None, optimizers=(optimizer, None))


def test_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pass peft_config=LoraConfig"):
        joint_trainer(tmp_path / "run", peft_config=None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(use_dora=True), "DoRA"),
        (lora(target_modules=["q_proj"], modules_to_save=["down_proj"]), "down_proj is pruned"),
    ],
)
def test_adapters_that_cannot_be_sliced_are_refused(tmp_path: Path, config: LoraConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        joint_trainer(tmp_path / "run", peft_config=config)


def test_two_adapters_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), lora())
    model.add_adapter("second", lora())
    with pytest.raises(ConfigError, match="one adapter"):
        joint_trainer(tmp_path / "run", model=model, peft_config=None)


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="IA3 adapters"):
        joint_trainer(tmp_path / "run", peft_config=config)


def test_all_refusals_come_at_once(tmp_path: Path) -> None:
    args = {"save_only_model": True, "optim": "adafactor"}
    with pytest.raises(ConfigError) as refused:
        joint_trainer(tmp_path / "run", args=args, prune=prune_config({"method": "saliency", "decay": 7}))
    assert len(refused.value.problems) == 3


def test_unsupported_architecture_is_refused_but_only_with_prune(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2() -> Any:
        return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=99, n_positions=64))

    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(UnsupportedModelError):
        joint_trainer(tmp_path / "joint", model=gpt2(), peft_config=config)
    plain = joint_trainer(tmp_path / "plain", model=gpt2(), peft_config=config, prune=None, args={"max_steps": 1})
    assert plain.train().global_step == 1


def test_rows_without_any_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training row is left"):
        joint_trainer(tmp_path / "run", args={"max_length": 3})


def test_adapter_of_a_run_opens_with_plain_peft(tmp_path: Path) -> None:
    """Gates leave no trace in what is saved."""
    trainer = joint_trainer(tmp_path / "run", args={"max_steps": 4, "save_steps": 1})
    trainer.train()
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "run" / "checkpoint-2")
    names = {name for name, parameter in plain.named_parameters() if "lora" in name}
    assert names == {name for name in weights(joint_trainer(tmp_path / "other")) if "lora" in name}
