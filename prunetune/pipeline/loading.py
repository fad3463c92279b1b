"""Bringing back what a run folder holds: the base, the plan, the adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from prunetune.core.errors import DataError
from prunetune.core.records import PreparedModel
from prunetune.model.quantized import keep_format
from prunetune.model.resolve import STOCK
from prunetune.train.checkpoint import global_step, newest, read_marker
from prunetune.train.freeze import FREEZE, adopt_freeze

TRAIN = "train"


def load_base(prepared: PreparedModel, dtype: str) -> Any:
    """The dense base model in ``dtype``."""
    return AutoModelForCausalLM.from_pretrained(prepared.folder, dtype=getattr(torch, dtype), **STOCK)


def load_for_training(prepared: PreparedModel, dtype: str, quantized: BitsAndBytesConfig | None = None) -> Any:
    """The dense base model that adapters are trained beside: straight on its device, quantised tensor by tensor."""
    model = AutoModelForCausalLM.from_pretrained(
        prepared.folder, dtype=getattr(torch, dtype), quantization_config=quantized, device_map=_place(), **STOCK
    )
    keep_format(model)
    return model


def _place() -> dict[str, int] | None:
    """This process's GPU; None without one, and where an engine spreads the weights itself."""
    spread = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    return None if spread or not torch.cuda.is_available() else {"": int(os.environ.get("LOCAL_RANK", "0"))}


def load_tokenizer(prepared: PreparedModel) -> Any:
    """The base model's tokenizer."""
    return AutoTokenizer.from_pretrained(prepared.folder, trust_remote_code=False)


def load_trained(
    run_folder: Path, prepared: PreparedModel, dtype: str, quantized: BitsAndBytesConfig | None = None
) -> tuple[Any, Any]:
    """The model as the run's newest checkpoint has it: sliced, compensated, adapters attached and unmerged.

    Returns:
        (PeftModel, plan).

    Raises:
        DataError: the run has not come so far that there is something to export.
    """
    output_dir = run_folder / TRAIN
    checkpoint = newest(output_dir, output_dir / FREEZE)
    if checkpoint is None:
        raise DataError(f"{run_folder} has no complete checkpoint; run `prunetune train` first")
    if not (read_marker(checkpoint) or {}).get("frozen"):
        raise DataError(
            f"the run in {run_folder} stopped at step {global_step(checkpoint)}, before its plan was frozen; go on "
            "with `prunetune train CONFIG --resume` and export then"
        )
    model = load_for_training(prepared, dtype, quantized)
    plan = adopt_freeze(model, output_dir / FREEZE)
    return PeftModel.from_pretrained(model, checkpoint), plan
