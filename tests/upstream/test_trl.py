"""What prunetune relies on in TRL, transformers, PEFT and accelerate without being promised it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from trl import SFTTrainer

from prunetune.train import compat
from prunetune.train.trainer import JointTrainer
from tests.support import batch, tiny_model, tiny_tokenizer
from tests.train.joint_runs import joint_trainer, lora, rows, sft_args


def sft(out: Path, **args: Any) -> SFTTrainer:
    """A plain SFTTrainer of the tiny model."""
    return SFTTrainer(
        model=tiny_model(),
        args=sft_args(out, **args),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora(lora_dropout=0.0),
    )


OVERRIDDEN = {
    # private and public methods that the trainers override or call, with the parameters they are used with
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "log": ["self", "logs", "start_time"],
    "create_optimizer": ["self", "model"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_prepare_inputs": ["self", "inputs"],
    "_clip_grad_norm": ["self", "model"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "_save": ["self", "output_dir", "state_dict"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_scaler": ["self", "checkpoint"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_method_has_the_signature_it_is_called_with(name: str) -> None:
    found = list(inspect.signature(getattr(SFTTrainer, name)).parameters)
    assert found[: len(OVERRIDDEN[name])] == OVERRIDDEN[name]


def test_rotation_can_be_held_back(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate_checkpoints(str(tmp_path), None)
    assert len(list(tmp_path.iterdir())) == 3, "no limit means no rotation; that is how it is held back"
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")


def test_trainer_has_the_attributes_that_are_read_or_set(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    names = ["_metrics", "_total_train_tokens", "callback_handler", "model_wrapped", "optimizer", "lr_scheduler"]
    for name in [*names, "accelerator", "data_collator", "state", "control", "train_dataset", "is_deepspeed_enabled"]:
        assert hasattr(trainer, name), name
    assert set(trainer._metrics) == {"train", "eval"}
    assert trainer._total_train_tokens == 0
    assert isinstance(trainer.callback_handler, CallbackHandler)
    assert trainer.accelerator.scaler is None


def test_fused_head_returns_per_token_statistics(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    trainer.model.eval()
    inputs = {**batch(rows=2, length=9)}
    labels = inputs["input_ids"].clone()
    labels[:, :3] = -100
    with torch.no_grad():
        output = trainer.model(**inputs, labels=labels, fused_lm_head=True)
        logits = trainer.model(**inputs).logits.float()
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        assert getattr(output, name).shape == (2, 8), name
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    mask = output.label_mask.bool()
    assert mask.sum() == 2 * 6
    assert float(-output.log_probs[mask].mean()) == pytest.approx(float(wanted), rel=1e-5)
    assert float(output.log_probs[~mask].abs().sum()) == 0


def test_items_in_a_batch_are_labels_after_the_first_position(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    labels = torch.tensor([[5, -100, 6, 7], [8, 9, -100, -100]])
    assert int(trainer._get_num_items_in_batch([{"labels": labels}], torch.device("cpu"))) == 3


def test_signature_columns_are_those_that_calibration_rows_have(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    trainer._set_signature_columns_if_needed()
    assert trainer._signature_columns == ["input_ids", "labels", "seq_lengths"]
    collated = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    assert {"input_ids", "labels", "attention_mask"} == set(collated)


class Order(TrainerCallback):
    """Writes down what happens."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.grads: dict[str, bool] = {}
        self.trainer: Any = None

    def _see(self, name: str) -> None:
        self.events.append(name)
        parameters = self.trainer.model.parameters()
        self.grads[name] = any(p.grad is not None and bool(p.grad.any()) for p in parameters)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._see("begin")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._see("substep")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._see("pre")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._see("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._see("end")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._see("log")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._see("evaluate")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._see("save")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._see("epoch")


def test_callbacks_come_in_the_order_that_a_step_is_built_on(tmp_path: Path) -> None:
    args = {"max_steps": 1, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = SFTTrainer(
        model=tiny_model(),
        args=sft_args(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2, **args),
        train_dataset=rows(),
        eval_dataset=rows(4),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
    )
    order = Order()
    order.trainer = trainer
    trainer.add_callback(order)
    trainer.train()
    # Evaluation logs its own numbers before it is announced; the log and the validation come before the save.
    head = ["begin", "substep", "pre", "optimizer", "end", "log", "log", "evaluate", "save", "epoch"]
    assert order.events[: len(head)] == head
    assert order.grads["pre"], "gradients are there before the optimizer steps"
    assert not order.grads["end"]


def test_own_callbacks_come_after_the_users_so_that_they_see_what_those_asked_for(tmp_path: Path) -> None:
    user = Order()
    trainer = joint_trainer(tmp_path, callbacks=[user])
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names.index("DefaultFlowCallback") < names.index("Order") < names.index("JointCallback")
    assert names.index("JointCallback") < names.index("MetricsFile")
    assert not {ProgressCallback.__name__, PrinterCallback.__name__} & set(names)


def test_handlers_end_is_an_attribute_that_can_be_replaced_and_restored() -> None:
    handler = CallbackHandler([], None, None, None, None)
    seen: list[str] = []
    handler.call_event = lambda name, *_args, **_kwargs: seen.append(name)  # type: ignore[assignment]
    with compat.one_run(handler, lambda: False):
        handler.on_train_end(None, None, None)
    assert seen == []
    with compat.one_run(handler, lambda: True):
        handler.on_train_end(None, None, None)
    assert seen == ["on_train_end"]
    assert "on_train_end" not in vars(handler)


def test_model_that_was_evaluated_counts_as_prepared_until_told_otherwise(tmp_path: Path) -> None:
    trainer = joint_trainer(tmp_path, prune=None, eval_dataset=rows(4))
    trainer.evaluate()
    assert vars(trainer.model)["_is_accelerate_prepared"], "this is what would keep DDP from wrapping it"
    compat.unprepare(trainer.model)
    assert not getattr(trainer.model, "_is_accelerate_prepared", False)


def test_checkpoint_has_the_files_that_are_sliced(tmp_path: Path) -> None:
    trainer = sft(tmp_path, max_steps=1, save_steps=1)
    trainer.train()
    files = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "rng_state.pth"} <= files


def test_adapter_file_has_a_label_for_every_trained_parameter(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    labels = compat.adapter_names(trainer.model, trained)
    assert sorted(labels.values()) == sorted(saved)
    assert all(torch.equal(saved[labels[name]], parameter) for name, parameter in trained.items())


def test_second_training_call_makes_a_new_scheduler_and_keeps_the_step_count(tmp_path: Path) -> None:
    trainer = sft(tmp_path, max_steps=4, save_steps=2, lr_scheduler_type="linear")
    trainer.train()
    wanted = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model_wrapped = trainer.model
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry] == wanted
    assert trainer.state.global_step == 4


def test_trainer_takes_one_step_too_many_when_resumed_at_the_end(tmp_path: Path) -> None:
    """Why a finished run is not handed to Trainer.train; when this fails, JointTrainer._finished can go."""
    trainer = sft(tmp_path, max_steps=3, save_steps=3)
    trainer.train()
    again = sft(tmp_path, max_steps=3, save_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 4


def test_summary_is_the_dict_that_was_logged(tmp_path: Path) -> None:
    class Marking(SFTTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "train_runtime" in logs:
                logs["marked"] = 1.0
            super().log(logs, start_time)

    trainer = Marking(
        model=tiny_model(),
        args=sft_args(tmp_path, max_steps=1),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
    )
    assert trainer.train().metrics["marked"] == 1.0


def test_loss_is_divided_once_under_accumulation(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    assert trainer.loss_is_scaled_for_ga in (None, True)
    assert trainer.model_accepts_loss_kwargs, "num_items_in_batch divides the loss, the Trainer must not do it again"


def test_adapters_stay_in_float32_on_a_16_bit_base_and_nothing_else_trains(tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=tiny_model().to(torch.bfloat16),
        args=sft_args(tmp_path, bf16=True),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
    )
    trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert set(trained.values()) == {torch.float32}


def test_peft_names_and_delta_are_what_surgery_reads() -> None:
    model = get_peft_model(tiny_model(), lora())
    layer = model.get_base_model().get_submodule("model.layers.1.mlp.down_proj")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(layer.get_delta_weight("default"), delta)
    assert layer.active_adapters == ["default"]
    assert layer.base_layer.weight.shape == delta.shape
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_A.default.weight" in dict(model.named_parameters())


def test_adapter_of_a_checkpoint_opens_with_plain_peft_and_computes_the_same(tmp_path: Path) -> None:
    trainer = joint_trainer(tmp_path, prune=None, args={"max_steps": 2})
    trainer.train()
    trainer.model.eval()
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-2").eval()
    with torch.no_grad():
        found, wanted = plain(**batch()).logits, trainer.model(**batch()).logits
        base = tiny_model()(**batch()).logits
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(found, base, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gates_inside_checkpointed_layers_get_gradients(tmp_path: Path, reentrant: bool) -> None:
    kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if trainer._search is not None:
                seen.append(trainer._search.gate_set.collect().grad)

    trainer = joint_trainer(tmp_path, args={"max_steps": 2, **kwargs}, callbacks=[Watch()])
    trainer.train()
    assert seen
    assert all(bool(grad.any()) for grad in seen[0].values())


def test_every_private_name_used_in_train_is_covered_here() -> None:
    """A private attribute of Trainer that the code starts to use must get a line in this file."""
    import re

    folder = Path(inspect.getfile(JointTrainer)).parent
    used = set()
    for file in folder.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        used |= set(re.findall(r"(?:self|trainer|super\(\))\.(_[a-z]\w+)", text))
    private = {name for name in used if hasattr(Trainer, name) or hasattr(SFTTrainer, name)}
    private |= {name for name in ("_metrics", "_total_train_tokens") if name in used}
    text = Path(__file__).read_text(encoding="utf-8")
    assert {name for name in private if name not in text} == set()
