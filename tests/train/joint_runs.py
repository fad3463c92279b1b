"""Tiny joint runs that the tests of training share: one trainer, its metrics without times, its weights."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from trl import SFTConfig

from prunetune.config.schema import PhaseConfig, PruneConfig, TargetConfig
from prunetune.train.trainer import JointTrainer
from tests.support import tiny_model, tiny_rows, tiny_tokenizer

STEPS = 8  # with PHASES: warm-up [0, 1), search [1, 4), recover [4, 8)
FREEZE_STEP = 4
# 20 rows in batches of 4 are 5 steps an epoch: the run crosses an epoch after the freeze.
ROWS = 20
UNITS = ("mlp_channels", "kv_groups")
PHASES = PhaseConfig(warmup=0.1, search=0.4)


def sft_args(out: Path, **changes: Any) -> SFTConfig:
    """TRL's config of a tiny CPU run that logs every step and checkpoints every other one."""
    values: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "activation_checkpointing": False,
        "seed": 1,
        "disable_tqdm": True,
    }
    return SFTConfig(**{**values, **changes})


def lora(**changes: Any) -> LoraConfig:
    """Adapters on every linear, with dropout so that the random state matters."""
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, **changes})


def prune_config(
    mask: Any = "saliency", compensation: Any = "none", units: Sequence[str] = UNITS, kept: str = "60%", **more: Any
) -> PruneConfig:
    """60% of a tiny model, MLP widths in eights, frozen half way."""
    target = TargetConfig(kept=kept, align=8, units=tuple(units))
    return PruneConfig(**{"target": target, "mask": mask, "compensation": compensation, "phases": PHASES, **more})


def rows(number: int = ROWS, seed: int = 0) -> Dataset:
    """Prompt-completion rows."""
    return Dataset.from_list(tiny_rows(number, seed))


@functools.cache
def _known_weights() -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = joint_trainer(Path(folder), prune=None, peft_config=None)
        batch = trainer.data_collator([trainer.train_dataset[number] for number in range(ROWS)])
    model = tiny_model().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss.backward()
        optimizer.step()
    return {name: weight.detach() for name, weight in model.state_dict().items()}


def known_model() -> Any:
    """A tiny model that knows the rows, so that it matters what is cut."""
    model = tiny_model()
    model.load_state_dict(_known_weights())
    return model.eval()


def joint_trainer(
    out: Path,
    *,
    prune: PruneConfig | str | None = "default",
    model: Any = None,
    peft_config: Any = "default",
    train_dataset: Any = None,
    args: dict[str, Any] | None = None,
    kind: type[JointTrainer] = JointTrainer,
    **kwargs: Any,
) -> Any:
    """A trainer of a tiny llama; ``args`` are changes of ``sft_args``, the rest goes to the trainer."""
    if peft_config == "default":
        peft_config = lora()
    return kind(
        tiny_model() if model is None else model,
        sft_args(out, **(args or {})),
        prune=prune_config() if prune == "default" else prune,
        train_dataset=rows() if train_dataset is None else train_dataset,
        processing_class=kwargs.pop("processing_class", None) or tiny_tokenizer(),
        peft_config=peft_config,
        **kwargs,
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of every parameter by name."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def require_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Asserts that two sets of named tensors are equal to the bit."""
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different, f"{len(different)} tensors differ, e.g. {different[:3]}"


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def timeless(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without times, and without the summary, whose loss and FLOPs count only the steps of the last call."""
    return [
        {key: value for key, value in entry.items() if not any(t in key for t in ("second", "runtime", "_time"))}
        for entry in entries
        if "train_runtime" not in entry
    ]


def checkpoints(out: Path) -> list[int]:
    """Steps of the checkpoint folders, complete or not."""
    return sorted(int(path.name.partition("-")[2]) for path in Path(out).glob("checkpoint-*"))
