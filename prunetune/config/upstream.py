"""What the pinned libraries accept, read from their source files: importing them would load torch."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

# Fields of trl.SFTConfig that have a setting of their own here; set in two places they could disagree.
OWN_SETTING = {
    "output_dir": "folder",
    "seed": "seed",
    "data_seed": "seed",
    "max_steps": "train.max_steps",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.scheduler",
    "warmup_steps": "train.warmup_steps",
    "max_length": "train.max_length",
    "packing": "train.packing",
    "bf16": "train.bf16",
    "gradient_checkpointing": "train.activation_checkpointing",
    "activation_checkpointing": "train.activation_checkpointing",
    "completion_only_loss": "train.completion_only",
    "assistant_only_loss": "train.assistant_only",
    "logging_steps": "train.log_every",
    "save_steps": "train.save_every",
    "eval_steps": "train.eval_every",
    "save_total_limit": "train.keep_checkpoints",
    "report_to": "train.report_to",
}


@cache
def sft_fields() -> frozenset[str]:
    """Names of all fields of trl.SFTConfig, inherited ones included; empty if trl is not installed."""
    names: set[str] = set()
    for package, file, name in (
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("transformers", "training_args.py", "TrainingArguments"),
    ):
        body = _class_body(package, file, name)
        names.update(
            item.target.id for item in body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        )
    return frozenset(name for name in names if not name.startswith("_"))


@cache
def scheduler_names() -> frozenset[str]:
    """Names of transformers' learning-rate schedules; empty if transformers is not installed."""
    body = _class_body("transformers", "trainer_utils.py", "SchedulerType")
    values = [item.value for item in body if isinstance(item, ast.Assign)]
    return frozenset(
        value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)
    )


def _class_body(package: str, file: str, name: str) -> list[ast.stmt]:
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / file
        if path.exists():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return node.body
    return []
