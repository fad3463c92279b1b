"""What SFTTrainer takes, the joint trainer takes: models, rows, packing, evaluation, callbacks, trackers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from transformers import TrainerCallback

from prunetune.core.errors import ConfigError
from prunetune.train.calibration import calibration_batches
from prunetune.train.trainer import JointTrainer
from tests.support import tiny_folder, tiny_model, tiny_rows, tiny_tokenizer
from tests.train.joint_runs import (
    FREEZE_STEP,
    STEPS,
    joint_trainer,
    lora,
    metrics,
    prune_config,
    require_same,
    rows,
    sft_args,
    weights,
)

UNITS = ("mlp_channels", "kv_groups", "query_heads", "layers")


def require_pruned(trainer: JointTrainer) -> None:
    """The run came to its end with a smaller model whose config says so."""
    assert trainer.state.global_step == STEPS
    assert trainer.plan is not None
    shape, config = trainer.shape, trainer.model.config
    assert (shape.layers, shape.mlp_channels) == (config.num_hidden_layers, config.intermediate_size)
    assert shape.mlp_channels < 64 or shape.kv_groups < 3 or shape.layers < 3
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == list(range(1, STEPS + 1))


def messages(number: int) -> Dataset:
    """Conversations of one question and one answer."""
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"].strip()},
                ]
            }
            for row in tiny_rows(number)
        ]
    )


def test_model_given_as_a_path(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    trainer = JointTrainer(
        model=str(folder),
        args=sft_args(tmp_path / "run", model_init_kwargs={"dtype": "float32"}),
        train_dataset=rows(),
        peft_config=lora(),
        prune=prune_config(),
    )
    trainer.train()
    require_pruned(trainer)


def test_peft_model_given_instead_of_peft_config(tmp_path: Path) -> None:
    given = joint_trainer(tmp_path / "given", model=get_peft_model(tiny_model(), lora()), peft_config=None)
    given.train()
    require_pruned(given)


@pytest.mark.parametrize("assistant_only", [False, True])
def test_messages_with_loss_on_answers_only(tmp_path: Path, assistant_only: bool) -> None:
    trainer = joint_trainer(
        tmp_path / "run",
        train_dataset=messages(20),
        processing_class=tiny_tokenizer(chat=True),
        args={"assistant_only_loss": assistant_only},
    )
    labels = trainer.train_dataset[0]["labels"]
    assert (-100 in labels) == assistant_only
    trainer.train()
    require_pruned(trainer)


@pytest.mark.parametrize("completion_only", [False, True])
def test_completion_only_loss(tmp_path: Path, completion_only: bool) -> None:
    trainer = joint_trainer(tmp_path / "run", args={"completion_only_loss": completion_only})
    assert (-100 in trainer.train_dataset[0]["labels"]) == completion_only
    trainer.train()
    require_pruned(trainer)


def test_plain_text_rows(tmp_path: Path) -> None:
    text = Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in tiny_rows(20)])
    trainer = joint_trainer(tmp_path / "run", train_dataset=text)
    trainer.train()
    require_pruned(trainer)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_runs_on_a_cpu_through_freeze_and_refit(tmp_path: Path, strategy: str) -> None:
    """Both strategies; documents see each other in ``wrapped`` only, as in TRL."""
    prune = prune_config(compensation={"method": "refit", "tokens": 256})
    args = {"packing": True, "packing_strategy": strategy, "max_length": 24, "per_device_train_batch_size": 2}
    trainer = joint_trainer(tmp_path / "run", prune=prune, train_dataset=rows(40), args=args)
    assert trainer.padding_free == (strategy == "bfd")
    trainer.train()
    require_pruned(trainer)


def test_streamed_rows(tmp_path: Path) -> None:
    """Without a length there is nothing to draw calibration rows from, so the freeze goes without refit."""
    streamed = rows(40).to_iterable_dataset()
    assert isinstance(streamed, IterableDataset)
    trainer = joint_trainer(tmp_path / "run", train_dataset=streamed)
    trainer.train()
    require_pruned(trainer)


def test_streamed_rows_are_refused_with_refit_at_construction(tmp_path: Path) -> None:
    prune = prune_config(compensation={"method": "refit", "tokens": 256})
    with pytest.raises(ConfigError, match="streamed rows"):
        joint_trainer(tmp_path / "run", prune=prune, train_dataset=rows(40).to_iterable_dataset())


@pytest.mark.parametrize(("processes", "size"), [(1, 4), (2, 2), (2, 3), (3, 1)])
def test_calibration_rows_are_the_same_for_any_batch_size_and_number_of_processes(processes: int, size: int) -> None:
    data = [{"input_ids": [i] * (5 + i % 4)} for i in range(30)]

    def drawn(processes: int, size: int) -> list[int]:
        found = []
        for rank in range(processes):
            trainer = SimpleNamespace(
                train_dataset=data,
                accelerator=SimpleNamespace(num_processes=processes, process_index=rank),
                args=SimpleNamespace(per_device_train_batch_size=size),
                data_collator=lambda chosen: [row["input_ids"][0] for row in chosen],
                _prepare_inputs=lambda batch: batch,
            )
            found += [index for batch in calibration_batches(trainer, 100, 0) for index in batch]
        return sorted(found)

    assert drawn(processes, size) == drawn(1, 1)
    assert 100 <= sum(5 + i % 4 for i in drawn(1, 1)) < 109


def test_evaluation_before_the_freeze_is_deterministic_and_leaves_the_run_alone(tmp_path: Path) -> None:
    # Without dropout: iterating over evaluation rows draws from torch's generator, in plain TRL too.
    common: dict[str, Any] = {
        "prune": prune_config("hard_concrete", units=UNITS),
        "peft_config": lora(lora_dropout=0.0),
    }
    plain = joint_trainer(tmp_path / "plain", **common)
    plain.train()
    args = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    watched = joint_trainer(tmp_path / "watched", **common, eval_dataset=rows(6, seed=4), args=args)
    twice = []

    class Twice(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == FREEZE_STEP - 1:
                twice.extend(watched.evaluate()["eval_loss"] for _ in range(2))

    watched.add_callback(Twice())
    watched.train()
    assert twice[0] == twice[1]
    require_same(weights(watched), weights(plain))
    assert sum("eval_loss" in entry for entry in metrics(tmp_path / "watched")) >= STEPS


class Tracker(TrainerCallback):
    """What wandb and its like do: open at the beginning, log, close at the end."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.logged: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("begin")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.events.append("log")
        self.logged.append({"step": state.global_step, **logs})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("end")


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("pruned", [True, False])
def test_trackers_see_one_run(tmp_path: Path, pruned: bool, steps: int) -> None:
    tracker = Tracker()
    prune: Any = "default" if pruned else None
    result = joint_trainer(tmp_path / "run", prune=prune, callbacks=[tracker], args={"max_steps": steps}).train()
    assert tracker.events.count("end") == 1
    assert tracker.events[-1] == "end", "nothing is logged once the tracker is closed"
    summaries = [logs for logs in tracker.logged if "train_runtime" in logs]
    assert len(summaries) == 1
    losses = [logs["loss"] for logs in tracker.logged if "loss" in logs]
    assert len(losses) == steps
    assert summaries[0]["train_loss"] == pytest.approx(sum(losses) / steps, rel=1e-5)
    assert result.training_loss == result.metrics["train_loss"] == summaries[0]["train_loss"]
    seconds = summaries[0]["train_runtime"]
    assert summaries[0]["train_steps_per_second"] == pytest.approx(steps / seconds, rel=0.05)


def test_integration_named_in_report_to_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import integrations

    tracker = Tracker()
    monkeypatch.setitem(integrations.integration_utils.INTEGRATION_TO_CALLBACK, "dummy", tracker)
    monkeypatch.setattr(integrations.integration_utils, "get_available_reporting_integrations", lambda: ["dummy"])
    joint_trainer(tmp_path / "run", args={"report_to": "dummy"}).train()
    assert tracker.events.count("end") == 1
    assert {"kept_fraction", "loss", "units_retargeted"} <= tracker.logged[2].keys()


class StopAt(TrainerCallback):
    """Ends the training as early stopping does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_callback_that_ends_training_before_the_freeze_ends_it(tmp_path: Path) -> None:
    tracker = Tracker()
    trainer = joint_trainer(tmp_path / "run", callbacks=[StopAt(2), tracker])
    assert trainer.train().global_step == 2
    assert trainer.plan is None
    assert trainer.model.config.intermediate_size == 64
    assert tracker.events[-1] == "end"
    assert tracker.events.count("end") == 1


def test_callback_that_ends_training_after_the_freeze_ends_it(tmp_path: Path) -> None:
    trainer = joint_trainer(tmp_path / "run", callbacks=[StopAt(6)])
    assert trainer.train().global_step == 6
    assert trainer.plan is not None


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"])
def test_optimizers_whose_state_can_be_sliced(tmp_path: Path, optim: str) -> None:
    args = {"optim": optim, "weight_decay": 0.1}
    trainer = joint_trainer(tmp_path / "run", prune=prune_config(units=UNITS), args=args)
    trainer.train()
    require_pruned(trainer)


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text"])
def test_other_families_and_bfloat16_bases(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type).to(torch.bfloat16)
    prune = prune_config(compensation={"method": "refit", "tokens": 256}, units=UNITS)
    trainer = joint_trainer(tmp_path / "run", model=model, prune=prune, args={"bf16": True})
    trainer.train()
    require_pruned(trainer)
    lora_dtypes = {p.dtype for name, p in trainer.model.named_parameters() if "lora" in name}
    assert lora_dtypes == {torch.float32}


def test_epochs_instead_of_steps(tmp_path: Path) -> None:
    trainer = joint_trainer(tmp_path / "run", args={"max_steps": -1, "num_train_epochs": 2}, train_dataset=rows(16))
    trainer.train()
    require_pruned(trainer)
