"""What a run would do, from its settings and the base model's config.json alone: no torch, no weights, no rows.

The shape shown is the largest legal one; which of the legal shapes is taken, and which units stay, is decided while
the adapters learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from prunetune.config.presets import Derived, derive, export_folder, phase_steps, total_steps
from prunetune.config.rules import cautions
from prunetune.config.schema import RunConfig
from prunetune.config.selection_rules import step_cost
from prunetune.core.errors import ConfigError, Problem
from prunetune.core.files import free_bytes
from prunetune.core.sizes import format_bytes
from prunetune.model.architecture import Architecture, describe
from prunetune.model.budget import (
    Shape,
    decoder_params,
    flops_per_token,
    full_shape,
    kept_fractions,
    kv_cache_bytes_per_token,
    total_params,
    weight_bytes,
)
from prunetune.model.planner import Planner
from prunetune.model.resolve import read_config
from prunetune.pipeline.memory import lora_params, training_memory


@dataclass(frozen=True)
class Facts:
    """One model by arithmetic. Memory parts are bytes at the peak of a training step."""

    shape: Shape
    total_params: int
    decoder_params: int
    size_bytes: int
    flops_per_token: int
    kv_bytes_per_token: int
    lora_params: int
    memory: dict[str, int]

    @property
    def memory_bytes(self) -> int:
        """All parts together."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class RunPlan:
    """What `prunetune plan` shows.

    Args:
        dense: the base model while all of it is there (warm-up and search).
        compact: the largest legal shape inside the budget (recover and export).
        candidates: all legal shapes inside the budget, largest first.
        kept: both kept fractions of the compact shape, by denominator.
        budget: the budget in words.
        rows: training rows, if they can be counted without reading the data.
        steps: optimizer steps, if they are known.
        relative_flops: training FLOPs of the run / of a plain LoRA run of as many steps; None without steps.
        derived: values that nobody set, with reasons.
        warnings: what may not be meant, or may not fit.
    """

    config: RunConfig
    architecture: Architecture
    dense: Facts
    compact: Facts
    candidates: tuple[Shape, ...]
    kept: dict[str, float]
    budget: str
    rows: int | None
    steps: int | None
    relative_flops: float | None
    derived: tuple[Derived, ...]
    warnings: tuple[str, ...]


def plan_run(config: RunConfig) -> RunPlan:
    """Sizes, memory, FLOPs, steps and warnings of a run.

    Raises:
        UnsupportedModelError: the model is not found, or its architecture has no unit table.
        BudgetError: no legal shape meets the budget.
        ConfigError: no adapter would be placed.
    """
    arch = describe(read_config(config.model.name, config.model.revision))
    planner = Planner(arch, config.target, config.export.dtype)
    candidates = sorted(planner.candidates, key=lambda s: (planner.budget.cost(arch, s), s), reverse=True)
    dense, compact = _facts(arch, full_shape(arch), config), _facts(arch, candidates[0], config)
    _require_adapters(config, dense)
    rows = count_rows(config)
    steps = _steps(config, rows)
    return RunPlan(
        config=config,
        architecture=arch,
        dense=dense,
        compact=compact,
        candidates=tuple(candidates),
        kept=kept_fractions(arch, candidates[0]),
        budget=planner.budget.show(),
        rows=rows,
        steps=steps,
        relative_flops=_relative_flops(config, steps, dense, compact),
        derived=tuple(derive(config, steps)),
        warnings=(
            *cautions(config, steps),
            *_selection_warnings(config, steps),
            *_resource_warnings(config, arch, dense, compact),
        ),
    )


def count_rows(config: RunConfig) -> int | None:
    """Training rows left after the validation split, for JSON lines files; None for everything else."""
    path = Path(config.data.train).expanduser()
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return None
    with open(path, "rb") as file:
        rows = sum(1 for line in file if line.strip())
    if config.data.validation is None:
        rows -= min(config.data.validation_rows, max(1, round(rows * config.data.validation_fraction)))
    return min(rows, config.data.max_rows) if config.data.max_rows else rows


def _facts(arch: Architecture, shape: Shape, config: RunConfig) -> Facts:
    return Facts(
        shape=shape,
        total_params=total_params(arch, shape),
        decoder_params=decoder_params(arch, shape),
        size_bytes=weight_bytes(arch, shape, config.export.dtype),
        flops_per_token=flops_per_token(arch, shape, config.train.max_length),
        kv_bytes_per_token=kv_cache_bytes_per_token(arch, shape, config.export.dtype),
        lora_params=lora_params(arch, shape, config.lora.rank, config.lora.targets),
        memory=training_memory(arch, shape, config, gpu=has_gpu()),
    )


def _require_adapters(config: RunConfig, dense: Facts) -> None:
    if dense.lora_params == 0:
        names = config.lora.targets if isinstance(config.lora.targets, str) else ", ".join(config.lora.targets)
        message = f"{names} matches no linear of this model; write all-linear, or names such as [q_proj, v_proj]"
        raise ConfigError([Problem(message, "lora.targets")])


def _steps(config: RunConfig, rows: int | None) -> int | None:
    if config.train.max_steps > 0:
        return config.train.max_steps
    # Packing puts several rows into one, how many only the tokens tell. What a mask holds out (atp with alternate) is
    # not left out here: masks need torch, which planning does without.
    return total_steps(config.train, rows) if rows and not config.train.packing else None


def _relative_flops(config: RunConfig, steps: int | None, dense: Facts, compact: Facts) -> float | None:
    if steps is None:
        return None
    parts = phase_steps(config.phases, steps)
    narrowing = (parts.freeze + parts.recover * compact.flops_per_token / dense.flops_per_token) / steps
    return narrowing * step_cost(config, steps, _scoring_passes(config))


def _scoring_passes(config: RunConfig) -> int:
    if config.selection() is None:
        return 0
    from prunetune.methods.online import scoring_passes

    return scoring_passes(config.selection())


def _selection_warnings(config: RunConfig, steps: int | None) -> Iterator[str]:
    cost = step_cost(config, steps, _scoring_passes(config)) if steps else 1.0
    if cost > 1.005 and config.data.online.rescore_after == 0:
        yield (
            f"choosing while training makes a step {cost - 1:.0%} dearer: rows are scored by a forward pass of their "
            "own, which pays below about half of the rows; lower data.samples.kept, or set data.online.rescore_after"
        )


def _resource_warnings(config: RunConfig, arch: Architecture, dense: Facts, compact: Facts) -> Iterator[str]:
    context = arch.config.get("max_position_embeddings")
    if isinstance(context, int) and config.train.max_length > context:
        yield f"train.max_length {config.train.max_length} is beyond the model's context of {context} tokens"
    available = psutil.virtual_memory().available
    if not has_gpu() and dense.memory_bytes > available:
        yield (
            f"training needs about {format_bytes(dense.memory_bytes)} of memory and {format_bytes(available)} is free; "
            "lower train.batch_size and raise train.accumulate, or set train.activation_checkpointing=true"
        )
    # Two checkpoints of adapters and moments, the freeze's refitted weights, and the export beside its successor.
    needed = 2 * compact.size_bytes + (config.train.keep_checkpoints + 1) * dense.lora_params * 12
    free = free_bytes(export_folder(config))
    if needed > free:
        yield (
            f"the run writes about {format_bytes(needed)} and {format_bytes(free)} is free at {config.folder}; "
            "make room or set folder to another disk"
        )


def has_gpu() -> bool:
    """Whether training would use an NVIDIA GPU; asked without torch."""
    return Path("/dev/nvidia0").exists()
