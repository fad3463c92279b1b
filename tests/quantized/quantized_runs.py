"""Tiny bases that bitsandbytes quantises, of widths that its CPU kernels read back, and joint runs on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from prunetune.config.schema import PruneConfig, TargetConfig
from tests.support import tiny_folder
from tests.train.joint_runs import PHASES

# Multiples of 64 whatever is cut: see model.quantized.require_sound.
WIDTHS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
KINDS = ("nf4", "fp4", "int8")


def quantized_folder(path: Path, **changes: Any) -> Path:
    """A tiny llama folder in float32."""
    return tiny_folder(path, **{**WIDTHS, **changes})


def settings(kind: str) -> BitsAndBytesConfig:
    """What a user of transformers writes; 4-bit kinds with double quantisation."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def load(folder: Path, kind: str) -> Any:
    """The folder's model, quantised as it is loaded."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings(kind), dtype=torch.float32)


def prune_config(mask: Any = "saliency", compensation: Any = "none", kept: str = "70%", **more: Any) -> PruneConfig:
    """MLP widths in steps of 64, frozen half way."""
    target = TargetConfig(kept=kept, align=64)
    return PruneConfig(**{"target": target, "mask": mask, "compensation": compensation, "phases": PHASES, **more})
