"""Started once per process by the tests: a tiny run that chooses rows and tokens and leaves what each process saw.

Arguments: JSON with ``out``, and optionally ``rows`` of a process's batch, ``accumulate``, ``resume``, ``joint``,
``samples``, ``tokens``, ``rescore_after``, ``lengths`` (tokens of the data set's rows, which then are plain text),
``fsdp`` (see fsdp_on_cpu.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from prunetune.core.leaving import with_own_exit_code
from tests.distributed.fsdp_on_cpu import force_fsdp
from tests.distributed.joint_script import whole_weights
from tests.train.joint_runs import joint_trainer, lora, prune_config, rows
from tests.train.selecting_runs import losses, select


def main(asked: dict[str, Any]) -> None:
    """One process of the run."""
    torch.set_num_threads(1)
    if asked.get("fsdp"):
        force_fsdp()
    out = Path(asked["out"])
    data = rows(24)
    if "lengths" in asked:
        texts = [" ".join(f"w{(7 * i + 3 * j) % 90}" for j in range(size)) for i, size in enumerate(asked["lengths"])]
        data = Dataset.from_list([{"text": text} for text in texts])
    trainer = joint_trainer(
        out,
        prune=prune_config() if asked.get("joint") else None,
        peft_config=lora(lora_dropout=0.0),
        train_dataset=data,
        select=select(asked.get("samples"), asked.get("tokens"), rescore_after=asked.get("rescore_after", 0)),
        args={
            "per_device_train_batch_size": asked.get("rows", 2),
            "gradient_accumulation_steps": asked.get("accumulate", 1),
            "max_steps": asked.get("steps", 8),
        },
    )
    micro_batches: list[int] = []
    plain = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        micro_batches.append(len(inputs["input_ids"]))
        return plain(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train(resume_from_checkpoint=bool(asked.get("resume")))
    rank = trainer.accelerator.process_index
    found = {
        "engine": trainer.accelerator.distributed_type.value,
        "processes": trainer.accelerator.num_processes,
        "step": trainer.state.global_step,
        "plan": trainer.plan.digest() if trainer.plan else None,
        "losses": losses(trainer),
        "micro_batches": micro_batches,
    }
    (out / f"process{rank}.json").write_text(json.dumps(found))
    torch.save(whole_weights(trainer), out / f"weights{rank}.pt")
    trainer.end()


if __name__ == "__main__":
    with with_own_exit_code():
        main(json.loads(sys.argv[1]))
