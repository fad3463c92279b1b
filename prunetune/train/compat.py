"""Every private name of TRL, transformers and PEFT that prunetune relies on, and what cannot be combined.

tests/upstream checks each of them, so that a new release fails there and not in a user's run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from prunetune.core.errors import ConfigError, Problem
from prunetune.model.quantized import quantized_linears
from prunetune.model.surgery import base_model, foreign_quantization
from prunetune.model.token_stats import logit_softcap
from prunetune.train.launched import engine_problems, launch_problems

# Optimizers whose state has the shape of the parameters, so that it can be sliced with them.
SLICEABLE_OPTIMIZERS = frozenset({"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"})

__all__ = [
    "SLICEABLE_OPTIMIZERS",
    "hooks_saved_tensors",
    "one_run",
    "quiet_progress",
    "refusals",
    "selection_refusals",
]


def refusals(trainer: Any, optimizer: Any) -> list[Problem]:
    """What TRL allows but joint pruning cannot do, each with what to set instead."""
    args, model, found = trainer.args, trainer.model, []

    def refuse(when: Any, field: str, why: str) -> None:
        if when:
            found.append(Problem(why, field))

    refuse(
        args.optim not in SLICEABLE_OPTIMIZERS,
        "optim",
        f"{args.optim!s}: its state does not have the shape of the parameters and cannot be sliced at the freeze; "
        f"set one of {', '.join(sorted(SLICEABLE_OPTIMIZERS))}",
    )
    refuse(
        optimizer is not None,
        "optimizers",
        "a ready-made optimizer holds the dense parameters, which are replaced at the freeze; set args.optim instead",
    )
    refuse(
        args.load_best_model_at_end,
        "load_best_model_at_end",
        "checkpoints before and after the freeze have different shapes, so the best one may not fit; set it to False",
    )
    refuse(
        args.auto_find_batch_size,
        "auto_find_batch_size",
        "it restarts the run in the middle and would count gate scores twice; set per_device_train_batch_size",
    )
    refuse(
        args.save_only_model,
        "save_only_model",
        "the freeze slices a checkpoint with its optimizer; set it to False",
    )
    refuse(
        args.save_strategy == "best",
        "save_strategy",
        "the freeze slices the checkpoint of its own step, which need not be a best one; set steps, epoch or no",
    )
    refuse(args.torch_compile, "torch_compile", "compiled code keeps the dense shapes; set it to False")
    foreign = foreign_quantization(model)
    refuse(foreign, "model", f"{foreign}, whose packed weights cannot be cut; load it in bfloat16, or in nf4 or int8")
    found += launch_problems(trainer)
    if args.fp16:
        found += engine_problems(trainer, "float16 with a loss scale", "fp16")
    if quantized_linears(model):
        found += engine_problems(trainer, "quantised bases", "model")
    return found


def adapter_refusals(model: Any, linears: set[str]) -> list[Problem]:
    """What is wrong with the adapters of a PeftModel for joint pruning.

    Args:
        model: the model as the trainer holds it.
        linears: last names of the linears that the plan may cut, e.g. ``down_proj``.
    """
    configs = getattr(model, "peft_config", None)
    if configs is None:
        return [Problem("joint pruning trains LoRA adapters; pass peft_config=LoraConfig(...)", "peft_config")]
    found = []
    if len(configs) != 1:
        found.append(Problem(f"one adapter is trained and merged; the model has {sorted(configs)}", "peft_config"))
    for config in configs.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            found.append(Problem(f"{kind} adapters cannot be sliced with the model; use LoraConfig", "peft_config"))
        elif config.use_dora:
            found.append(
                Problem("DoRA's norms include the removed inputs, so slicing would change it; set False", "use_dora")
            )
        for name in getattr(config, "modules_to_save", None) or ():
            if name.rpartition(".")[2] in linears:
                found.append(Problem(f"{name} is pruned; train it through LoRA instead", "modules_to_save"))
    return found


def selection_refusals(trainer: Any, columns: frozenset[str], *, per_epoch: bool, weighted: bool) -> list[Problem]:
    """What TRL allows but choosing rows and tokens while training cannot do, each with what to set instead.

    Args:
        trainer: as it is after construction.
        columns: statistics that the methods read.
        per_epoch: whether rows are chosen once an epoch from their last losses. weighted: and weighted then.
    """
    args, model, found = trainer.args, trainer.model, []

    def refuse(when: Any, field: str, why: str) -> None:
        if when:
            found.append(Problem(why, field))

    refuse(args.packing, "packing", "packed rows cannot be told apart any more; set it to False to choose among rows")
    found += engine_problems(trainer, "choosing rows and tokens while training", "distributed_type")
    refuse(
        not args.average_tokens_across_devices,
        "average_tokens_across_devices",
        "processes keep different numbers of tokens, which must be counted together; set it to True",
    )
    refuse(
        args.auto_find_batch_size,
        "auto_find_batch_size",
        "it restarts the run in the middle and would choose twice; set per_device_train_batch_size",
    )
    refuse(
        getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False),
        "peft_config",
        "virtual tokens are not part of the rows that are scored; use LoraConfig",
    )
    refuse(
        "reference_nll" in columns and not hasattr(model, "disable_adapter"),
        "peft_config",
        "the method compares with the model without its adapters, and there are none; pass peft_config=LoraConfig(...)",
    )
    refuse(
        "grad_norm" in columns and logit_softcap(base_model(model).config) is not None,
        "data.samples.method",
        "needs gradients of the output layer, whose closed form does not hold for capped logits; use another method",
    )
    refuse(
        per_epoch and not hasattr(trainer.train_dataset, "__len__"),
        "train_dataset",
        "streamed rows have no epochs to choose in; load them, or use a method that chooses in every step",
    )
    refuse(per_epoch and args.torch_compile, "torch_compile", "compiled code cannot be listened to; set it to False")
    plain = args.loss_type in ("nll", "chunked_nll") and not args.label_smoothing_factor
    refuse(
        weighted and not (plain and trainer.compute_loss_func is None),
        "data.samples.weighted",
        f"weights multiply log-probabilities, which only the plain loss is linear in (loss_type {args.loss_type}, "
        f"label_smoothing_factor {args.label_smoothing_factor}); set weighted to false, or use loss_type='nll'",
    )
    return found


def raise_if_any(problems: list[Problem]) -> None:
    """Raises ConfigError with all the problems, if there are any."""
    if problems:
        raise ConfigError(problems)


def quiet_progress(trainer: Any) -> None:
    """Removes the progress bar and printer of transformers; prunetune draws one bar across the freeze."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)


def hooks_saved_tensors(trainer: Any) -> bool:
    """Whether activations are recomputed or offloaded: then a tensor kept for backward can be read once only."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    return bool(args.gradient_checkpointing or args.activation_offloading or model.is_activation_checkpointing)


def is_peft(model: Any) -> bool:
    """Whether the model is saved as adapters."""
    return isinstance(model, PeftModel)


def adapter_names(model: Any, parameters: Iterable[str]) -> dict[str, str]:
    """What PEFT calls parameters in an adapter's file: name in the model -> name there."""
    names = list(parameters)
    numbered = {name: torch.tensor(number) for number, name in enumerate(names)}
    labels = get_peft_model_state_dict(model, state_dict=numbered, save_embedding_layers=False)
    return {names[int(number)]: label for label, number in labels.items()}


def zero_stage(trainer: Any) -> int | None:
    """DeepSpeed's ZeRO stage that the run was launched with; None under other engines."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return None if plugin is None else int(plugin.zero_stage)


@contextlib.contextmanager
def without_engine(trainer: Any) -> Iterator[None]:
    """Lets Trainer evaluate as if there were no engine: it would make one, which for ZeRO-2 and FSDP2 fails."""
    was = trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled
    trainer.is_deepspeed_enabled = trainer.is_fsdp_enabled = False
    try:
        yield
    finally:
        trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = was
        trainer.accelerator.free_memory()
        unprepare(trainer.model)


def unprepare(model: Any) -> None:
    """Lets accelerate wrap a model for training that it prepared for an evaluation alone.

    Without it the model counts as prepared and is not wrapped in DDP: every process would train its own.
    """
    vars(model).pop("_is_accelerate_prepared", None)


@contextlib.contextmanager
def one_run(handler: CallbackHandler, is_over: Callable[[], bool]) -> Iterator[None]:
    """Lets two calls of ``Trainer.train`` look like one to trackers and other callbacks.

    Args:
        handler: the trainer's callback handler.
        is_over: asked at the end of the call; only if so is ``on_train_end`` announced, which is when trackers close.
            ``on_train_begin`` may come twice: trackers take the second for a resumption.
    """
    announce = handler.on_train_end

    def on_train_end(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return announce(args, state, control, **kwargs) if is_over() else control

    handler.on_train_end = on_train_end
    try:
        yield
    finally:
        handler.__dict__.pop("on_train_end", None)
