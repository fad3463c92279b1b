"""With nothing to remove, a joint run is a plain TRL LoRA run, step by step and to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import SFTTrainer

from prunetune.model.plan import Plan
from tests.support import tiny_arch, tiny_model, tiny_tokenizer
from tests.train.joint_runs import (
    FREEZE_STEP,
    joint_trainer,
    lora,
    prune_config,
    require_same,
    rows,
    sft_args,
    timeless,
    weights,
)

ALL_UNITS = ("mlp_channels", "kv_groups", "query_heads", "layers")


def plain_run(out: Path, **args: Any) -> SFTTrainer:
    """The run that anybody gets from TRL without prunetune."""
    trainer = SFTTrainer(
        model=tiny_model(),
        args=sft_args(out, **args),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        peft_config=lora(),
    )
    trainer.train()
    return trainer


def history(trainer: Any) -> list[dict[str, Any]]:
    """The logs of every step, without what plain TRL does not know."""
    own = ("kept_fraction", "units_retargeted")
    return [{k: v for k, v in entry.items() if k not in own} for entry in timeless(trainer.state.log_history)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mask", ["static", "saliency"])
def test_open_gates_equal_plain_lora_run_step_by_step(tmp_path: Path, mask: str, accumulate: int) -> None:
    args = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate}
    plain = plain_run(tmp_path / "plain", **args)
    Plan({}, tiny_arch().fingerprint()).save(tmp_path / "everything.json")
    chosen: Any = {"method": "static", "plan": tmp_path / "everything.json"} if mask == "static" else mask
    prune = prune_config(chosen, units=ALL_UNITS, kept="100%")
    joint = joint_trainer(tmp_path / "joint", prune=prune, args=args)
    joint.train()

    assert (tmp_path / "joint" / "freeze" / "checkpoint").is_dir(), "the run went through its freeze"
    logs, wanted = history(joint), history(plain)
    assert len(wanted) == 8
    assert {"loss", "grad_norm", "learning_rate", "num_tokens"} <= wanted[FREEZE_STEP].keys()
    assert logs == wanted
    require_same(weights(joint), weights(plain))


def test_joint_run_without_prune_is_plain_sft(tmp_path: Path) -> None:
    plain = plain_run(tmp_path / "plain")
    joint = joint_trainer(tmp_path / "joint", prune=None)
    joint.train()
    assert history(joint) == history(plain)
    require_same(weights(joint), weights(plain))
    assert joint.plan is None
    assert not (tmp_path / "joint" / "freeze").exists()
