"""Started once per process by test_two_processes: a tiny joint run on a quantised base that leaves what it came to.

Arguments: JSON with ``out``, ``base`` (model folder), ``kind``, ``compensation``, ``rows`` of a process's batch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from prunetune.model.quantized import quantized_linears, weight_of
from tests.quantized.quantized_runs import load, prune_config
from tests.train.joint_runs import joint_trainer, lora, rows, weights


def main(asked: dict[str, Any]) -> None:
    """One process of the run."""
    torch.set_num_threads(1)
    out = Path(asked["out"])
    trainer = joint_trainer(
        out,
        model=load(Path(asked["base"]), asked["kind"]),
        prune=prune_config(compensation=asked["compensation"]),
        peft_config=lora(lora_dropout=0.0),
        train_dataset=rows(24),
        args={"per_device_train_batch_size": asked["rows"], "ddp_find_unused_parameters": False},
    )
    trainer.train()
    rank = os.environ.get("RANK", "0")
    linears = {f"{path}.weight": weight_of(layer) for path, layer in quantized_linears(trainer.model).items()}
    torch.save({**weights(trainer), **linears}, out / f"weights{rank}.pt")
    found = {
        "engine": trainer.accelerator.distributed_type.value,
        "processes": trainer.accelerator.num_processes,
        "plan": trainer.plan.digest() if trainer.plan else None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    (out / f"process{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
