"""Which engine a run really got, and what cannot be had under it; the table is in config/engines.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from prunetune.config.engines import ENGINES, refusal
from prunetune.core.errors import Problem, ProcessLostError

# What gloo and NCCL say when the other end of a connection is gone.
_LOST = ("closed by peer", "reset by peer", "Connection refused", "Broken pipe", "NCCL", "remote process exited")
_ZERO_STAGES = {1: "zero2", 2: "zero2", 3: "zero3"}


def engine_name(trainer: Any) -> str:
    """The engine's name in ENGINES; accelerate's own word for one that is not there."""
    accelerator = trainer.accelerator
    kind = str(accelerator.distributed_type.value)
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return "ddp" if accelerator.num_processes > 1 else "single"
    if kind == "DEEPSPEED":
        stage = int(accelerator.state.deepspeed_plugin.zero_stage)
        return _ZERO_STAGES.get(stage, f"DEEPSPEED stage {stage}")
    if kind == "FSDP":
        version = int(accelerator.state.fsdp_plugin.fsdp_version)
        return "fsdp2" if version == 2 else f"FSDP version {version}"
    return kind


def launch_problems(trainer: Any) -> list[Problem]:
    """What is wrong with how the run was launched: another engine than was asked for, or one that cannot slice."""
    name, field = engine_name(trainer), "distributed_type"
    asked = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}
    kind = str(trainer.accelerator.distributed_type.value)
    found = [
        Problem(
            f"the launch asked for {wanted}, but accelerate made it {name}: with use_cpu it does so without a word. "
            "Launch on GPUs, or on CPUs with configs/accelerate/zero3.yaml",
            field,
        )
        for wanted, variable in asked.items()
        if os.environ.get(variable, "false") == "true" and kind != wanted
    ]
    if name not in ENGINES:
        found.append(Problem(f"{name} is not supported; launch with one of {', '.join(ENGINES)}", field))
    elif name.startswith("zero"):
        sections = trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        found += [
            Problem(f"{key} keeps moments where they cannot be gathered from; leave it out", field)
            for key in ("offload_optimizer", "offload_param")
            if (sections.get(key) or {}).get("device", "none") != "none"
        ]
    return found


@contextlib.contextmanager
def all_alive(trainer: Any) -> Iterator[None]:
    """Turns what a process sees when another one is gone into words."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)
        if trainer.accelerator.num_processes == 1 or not lost:
            raise
        raise ProcessLostError(
            f"process {trainer.accelerator.process_index} stops in step {trainer.state.global_step + 1}: another one "
            "of this run is gone (its own message is above, if it could leave one; killed processes leave none: look "
            f"for lack of memory). Checkpoints are whole: go on with --resume ({trainer.args.output_dir})"
        ) from error


def engine_problems(trainer: Any, feature: str, field: str) -> list[Problem]:
    """The problem, if there is one, with a feature of FEATURES under the run's engine.

    Args:
        trainer: as it is after construction.
        feature: the feature's name.
        field: what the user set.
    """
    why = refusal(engine_name(trainer), feature)
    return [Problem(why, field)] if why else []
