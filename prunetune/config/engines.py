"""Engines: how one run is spread over processes, and which features work under which.

One table says it: it refuses the other combinations, makes `prunetune list engines`, and is what `prunetune train
--launch` and the files in configs/accelerate are made from. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Engine:
    """One way to spread a run over processes.

    Args:
        summary: what each process holds.
        distributed_type: accelerate's word for it; None: no launcher.
        section: further settings of accelerate's launch file.
        package: what has to be installed beside prunetune.
        on_cpu: whether accelerate runs it on CPUs.
    """

    summary: str
    distributed_type: str | None = None
    section: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None
    on_cpu: bool = True


def _zero(stage: int) -> dict[str, Any]:
    return {"deepspeed_config": {"zero_stage": stage, **({"zero3_init_flag": True} if stage == 3 else {})}}


# Every parameter of an FSDP group must have one dtype and one shape of life: layers are the groups.
_FSDP2 = {
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_offload_params": False,
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    }
}

ENGINES: dict[str, Engine] = {
    "single": Engine("one process"),
    "ddp": Engine("everything; gradients are averaged", "MULTI_GPU"),
    "zero2": Engine("the model, a part of the optimizer", "DEEPSPEED", _zero(2), "deepspeed"),
    "zero3": Engine("a part of the weights and of the optimizer", "DEEPSPEED", _zero(3), "deepspeed"),
    "fsdp2": Engine("a part of the weights and of the optimizer (torch's own)", "FSDP", _FSDP2, on_cpu=False),
}

_PARTS = "{engine} spreads weights over processes"


@dataclass(frozen=True)
class Feature:
    """Something that is set in a configuration.

    Args:
        setting: where.
        refused: engine -> why it cannot work there.
        instead: what to set.
    """

    setting: str
    refused: Mapping[str, str] = field(default_factory=dict)
    instead: str = "launch with ddp"

    def reasons(self) -> dict[str, list[str]]:
        """Why it is refused -> the engines of which that is true."""
        found: dict[str, list[str]] = {}
        for engine, why in self.refused.items():
            found.setdefault(why.format(engine="it"), []).append(engine)
        return found


FEATURES: dict[str, Feature] = {
    "masks, freeze, live slicing": Feature("target, mask, phases"),
    "compensation": Feature("compensation"),
    "accumulation, checkpointing, bf16": Feature("train.accumulate, activation_checkpointing, bf16"),
    "padding-free batches": Feature("train.sft.padding_free"),
    "resume, also under another engine": Feature("--resume"),
    "export": Feature("export"),
    "float16 with a loss scale": Feature(
        "train.sft.fp16",
        {
            engine: "{engine} scales the loss by itself, and the gates' gradients with it"
            for engine in ("zero2", "zero3", "fsdp2")
        },
        "set train.bf16: true",
    ),
    "masks that read the adapters": Feature("mask: lora_gradient, atp, apt, gradual_zero, pat"),
    "masks that leave the adapters alone in some steps, beside modules trained whole": Feature(
        "mask: atp with modules_to_save",
        {engine: "{engine} counts the same steps for all that is trained" for engine in ("zero2", "zero3")},
        "launch with ddp or fsdp2, or train adapters on the decoder's linears alone",
    ),
    "adapter ranks": Feature("lora.ranks: light_peft, apt"),
    "distillation in the search": Feature("distill.weight"),
    "choosing rows and tokens while training": Feature("data.samples, data.tokens"),
    "penalty on what is learnt": Feature("delta.regularize"),
    "dropping a part of what was learnt": Feature("delta"),
    "pruning the hidden width": Feature(
        "target.units: [hidden]",
        {
            engine: "{engine} holds embeddings and norms in a form that is not cut"
            for engine in ("zero2", "zero3", "fsdp2")
        },
        "launch with ddp, or leave hidden out of target.units",
    ),
    "quantised bases": Feature(
        "model.quantize",
        {"zero3": f"{_PARTS}, and packed ones do not divide", "fsdp2": f"{_PARTS}, and packed ones do not divide"},
    ),
}


def refusal(engine: str, feature: str) -> str | None:
    """Why a feature cannot be had under an engine and what to do instead; None if it can."""
    why = FEATURES[feature].refused.get(engine)
    return None if why is None else f"{why.format(engine=engine)}; {FEATURES[feature].instead}"


def launch_settings(name: str, processes: int, *, cpu: bool) -> dict[str, Any]:
    """What accelerate's launch file for an engine holds.

    Args:
        name: of the engine.
        processes: on this machine.
        cpu: whether they compute on CPUs.
    """
    engine = ENGINES[name]
    return {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        **engine.section,
        "distributed_type": engine.distributed_type,
        "downcast_bf16": "no",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": processes,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": cpu,
    }


def markdown() -> str:
    """The table as a page: configs/accelerate/README.md."""
    lines = ["| feature | set by | " + " | ".join(ENGINES) + " |", "|---|---|" + "---|" * len(ENGINES)]
    for name, feature in FEATURES.items():
        cells = ("refused" if engine in feature.refused else "yes" for engine in ENGINES)
        lines.append(f"| {name} | `{feature.setting}` | " + " | ".join(cells) + " |")
    lines += ["", "| engine | every process holds | needs |", "|---|---|---|"]
    for name, engine in ENGINES.items():
        needs = f"`pip install 'prunetune[{engine.package}]'`" if engine.package else "" if engine.on_cpu else "GPUs"
        lines.append(f"| {name} | {engine.summary} | {needs} |")
    lines += ["", "Refused, and why:", ""]
    for name, feature in FEATURES.items():
        for reason, engines in feature.reasons().items():
            lines.append(f"* {name} under {', '.join(engines)}: {reason}; {feature.instead}.")
    return "\n".join(lines) + "\n"
