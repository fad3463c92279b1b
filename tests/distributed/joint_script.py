"""Started once per process by the tests: a tiny joint run that leaves what each process saw.

Arguments: JSON with ``out``, and optionally ``rows`` of a process's batch, ``accumulate``, ``resume``, ``interrupt``
(step in which the first process is asked to stop), ``nan`` (step in which the second process's loss is NaN), ``die``
(step in which the second process is killed), ``mask``, ``units``, ``dtype`` (of the base), ``distill`` (weight),
``delta`` and ``ranks`` (sections), ``export`` (whether), ``data`` (number of rows), ``tokens`` (of refit), ``args`` (of
TRL), ``fsdp`` (see fsdp_on_cpu.py), ``weights`` (file of the base's).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from prunetune.core.errors import DivergedError
from prunetune.core.leaving import with_own_exit_code
from prunetune.model.sharded import opened, whole
from prunetune.pipeline.trainer import PruneTuneTrainer
from tests.distributed.fsdp_on_cpu import force_fsdp
from tests.support import tiny_model
from tests.train.joint_runs import joint_trainer, lora, prune_config, rows, weights


class Gates(TrainerCallback):
    """Remembers the gates of every search step, all sites one after the other."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._search is not None:
            self.seen.append(torch.cat(list(self.trainer._search.gate_set.values().values())))


class Disturb(TrainerCallback):
    """Ctrl-C on the first process, a NaN loss on the second."""

    def __init__(self, asked: dict[str, Any]):
        self.asked, self.trainer = asked, None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, rank = state.global_step + 1, int(os.environ.get("RANK", "0"))
        if rank == 0 and step == self.asked.get("interrupt"):
            os.kill(os.getpid(), signal.SIGINT)
        if rank == 1 and step == self.asked.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and step == self.asked.get("nan"):
            with torch.no_grad():
                for parameter in kwargs["model"].parameters():
                    parameter.fill_(float("nan"))


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """A copy of every parameter by name, gathered where the engine spreads it; the trained ones in float32."""
    trained = trainer.engine.values()
    with opened(trainer.model):
        return {name: whole(weight) for name, weight in weights(trainer).items()} | trained


def main(asked: dict[str, Any]) -> None:
    """One process of the run."""
    torch.set_num_threads(1)
    if asked.get("fsdp"):
        force_fsdp()
    out = Path(asked["out"])
    refit = {"method": "refit", "tokens": asked.get("tokens", 256)}
    args = {
        "per_device_train_batch_size": asked.get("rows", 2),
        "gradient_accumulation_steps": asked.get("accumulate", 1),
        "ddp_find_unused_parameters": asked.get("unused", False),
    }
    gates, model = Gates(), tiny_model()
    if "weights" in asked:
        model.load_state_dict(torch.load(asked["weights"]))
    trainer = joint_trainer(
        out,
        model=model.to(getattr(torch, asked.get("dtype", "float32"))),
        prune=prune_config(
            asked.get("mask", "saliency"),
            refit,
            asked.get("units", ("mlp_channels", "kv_groups", "layers")),
            distill={"weight": asked.get("distill", 0.0)},
            delta=asked.get("delta", {}),
            ranks=asked.get("ranks", "keep"),
        ),
        peft_config=lora(lora_dropout=0.0),
        train_dataset=rows(asked.get("data", 24)),
        eval_dataset=rows(8, seed=5),
        evaluate_at_freeze=True,
        args=args | asked.get("args", {}),
        callbacks=[Disturb(asked), gates],
        kind=PruneTuneTrainer,
    )
    gates.trainer = trainer
    said = ""
    try:
        trainer.train(resume_from_checkpoint=bool(asked.get("resume")))
    except (KeyboardInterrupt, DivergedError) as stopped:
        said = f"{type(stopped).__name__}: {stopped}"
    found = {
        "engine": trainer.accelerator.distributed_type.value,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else "",
        "processes": trainer.accelerator.num_processes,
        "said": said,
        "step": trainer.state.global_step,
        "plan": trainer.plan.digest() if trainer.plan else None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "grad_norms": [float(entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry],
    }
    rank = trainer.accelerator.process_index
    (out / f"process{rank}.json").write_text(json.dumps(found))
    torch.save(gates.seen, out / f"gates{rank}.pt")
    torch.save(whole_weights(trainer), out / f"weights{rank}.pt")
    if asked.get("export"):
        trainer.export(out / "export", verify=False)
    trainer.end()


if __name__ == "__main__":
    with with_own_exit_code():
        main(json.loads(sys.argv[1]))
