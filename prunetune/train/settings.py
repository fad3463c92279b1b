"""From the run's settings to TRL's and PEFT's own configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig

from prunetune.config.presets import decay_steps, save_every
from prunetune.config.schema import RunConfig


def sft_config(config: RunConfig, output_dir: Path, steps: int) -> SFTConfig:
    """TRL's config of a run of ``steps`` optimizer steps; ``train.sft`` has the last word."""
    train = config.train
    cpu = not torch.cuda.is_available()
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "per_device_train_batch_size": train.batch_size,
        "per_device_eval_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulate,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": train.warmup_steps,
        "max_length": train.max_length,
        "packing": train.packing,
        "bf16": train.bf16,
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
        "activation_checkpointing": train.activation_checkpointing,
        # The old name defaults to on and is read by TRL; both must say the same.
        "gradient_checkpointing": train.activation_checkpointing,
        "completion_only_loss": train.completion_only,
        "assistant_only_loss": train.assistant_only,
        "logging_steps": train.log_every,
        "save_steps": save_every(train, steps),
        "save_total_limit": train.keep_checkpoints,
        "report_to": list(train.report_to) or "none",
        "seed": config.seed,
        "run_name": config.folder.name,
    }
    if train.scheduler == "warmup_stable_decay":
        values["lr_scheduler_kwargs"] = {"num_decay_steps": decay_steps(config.phases, steps)}
    if train.eval_every:
        values |= {"eval_strategy": "steps", "eval_steps": train.eval_every}
    return SFTConfig(**{**values, **train.sft})


def quantization(config: RunConfig) -> BitsAndBytesConfig | None:
    """How bitsandbytes quantises the base; 4-bit scales are quantised too."""
    kind = config.model.quantize
    if kind is None:
        return None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if config.train.bf16 else getattr(torch, config.model.dtype),
    )


def lora_config(config: RunConfig) -> LoraConfig:
    """PEFT's config of the adapters."""
    lora = config.lora
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )
