"""Everything that is derived from a setting rather than set, in one place, each with its printed reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from prunetune.config.schema import PhaseConfig, RunConfig, TrainSection


@dataclass(frozen=True)
class PhaseSteps:
    """Step boundaries: warm-up is [0, warmup_end), search [warmup_end, freeze), recover [freeze, total)."""

    warmup_end: int
    freeze: int
    total: int

    @property
    def warmup(self) -> int:
        """Optimizer steps with all gates open."""
        return self.warmup_end

    @property
    def search(self) -> int:
        """Optimizer steps in which gates move."""
        return self.freeze - self.warmup_end

    @property
    def recover(self) -> int:
        """Optimizer steps of the sliced model."""
        return self.total - self.freeze


@dataclass(frozen=True)
class Derived:
    """A value that nobody set, and why it is what it is."""

    name: str
    value: str
    reason: str


def phase_steps(phases: PhaseConfig, total_steps: int) -> PhaseSteps:
    """Where the phases begin and end.

    Args:
        phases: shares of the steps.
        total_steps: optimizer steps of the whole run, at least 1.

    Returns:
        0 <= warmup_end < freeze <= total: search has at least one step; from 2 steps on recover has at least
        one, and from 3 steps on so has warm-up, unless its share is 0.

    Raises:
        ValueError: ``total_steps`` is below 1.

    Example:
        >>> phase_steps(PhaseConfig(), 80)
        PhaseSteps(warmup_end=8, freeze=40, total=80)
    """
    if total_steps < 1:
        raise ValueError(f"a run has at least one step, not {total_steps}")
    latest_freeze = max(1, total_steps - 1)
    freeze = min(max(round((phases.warmup + phases.search) * total_steps), 1), latest_freeze)
    least_warmup = 1 if phases.warmup > 0 and total_steps >= 3 else 0
    freeze = max(freeze, least_warmup + 1)
    warmup_end = min(max(round(phases.warmup * total_steps), least_warmup), freeze - 1)
    return PhaseSteps(warmup_end, freeze, total_steps)


def total_steps(train: TrainSection, rows: int, processes: int = 1) -> int:
    """Optimizer steps of a run over ``rows`` unpacked training rows, counted as the Trainer counts them."""
    if train.max_steps > 0:
        return train.max_steps
    batches = math.ceil(rows / (train.batch_size * processes))
    return max(1, math.ceil(train.epochs * math.ceil(batches / train.accumulate)))


def save_every(train: TrainSection, steps: int) -> int:
    """Optimizer steps between checkpoints."""
    return train.save_every or max(1, steps // 10)


def learning_rate_warmup(train: TrainSection, steps: int) -> int:
    """Optimizer steps in which the learning rate rises to its full value."""
    return int(train.warmup_steps) if train.warmup_steps >= 1 else math.ceil(steps * train.warmup_steps)


def export_folder(config: RunConfig) -> Path:
    """Where the compact model is written."""
    return config.export.folder or config.folder / "compact"


def derive(config: RunConfig, steps: int | None) -> list[Derived]:
    """All derived values of a run of ``steps`` optimizer steps (None: not known yet), for printing."""
    train = config.train
    tokens = train.batch_size * train.accumulate * train.max_length
    per_step = f"batch {train.batch_size} x {train.accumulate} x {train.max_length} tokens, a process"
    derived = [*_phases(config, steps), Derived("tokens per step", f"up to {tokens:,}", per_step)]
    if train.save_every == 0:
        value = f"every {_steps(save_every(train, steps))}" if steps else "ten times"
        derived.append(Derived("checkpoint", value, f"train.save_every 0; the last {train.keep_checkpoints} are kept"))
    if train.eval_every == 0:
        derived.append(Derived("validation", "at freeze and end", "train.eval_every 0"))
    if config.export.folder is None:
        derived.append(Derived("export", str(export_folder(config)), "the run folder's compact/"))
    return derived


def _phases(config: RunConfig, steps: int | None) -> list[Derived]:
    train, phases = config.train, config.phases
    shares = (phases.warmup, phases.search, 1 - phases.warmup - phases.search)
    warmup, search, recover = (f"{share:.0%} of all steps" for share in shares)
    rise = "" if train.warmup_steps < 1 else _steps(int(train.warmup_steps))
    frozen = "then the plan is frozen"
    if steps is not None:
        parts = phase_steps(phases, steps)
        warmup, search, recover = (_steps(count) for count in (parts.warmup, parts.search, parts.recover))
        rise = _steps(learning_rate_warmup(train, steps))
        frozen = f"frozen at step {parts.freeze}"
    return [
        Derived("warm-up", warmup, f"phases.warmup {phases.warmup:.0%}; adapters settle first"),
        Derived("search", search, f"phases.search {phases.search:.0%}; gates close, {frozen}"),
        Derived("recover", recover, "what is left; the sliced model learns on"),
        Derived(
            "rate warm-up",
            rise or f"{train.warmup_steps:.0%} of all steps",
            f"train.warmup_steps {train.warmup_steps:g}, then {_after_rise(train.scheduler)}",
        ),
    ]


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _after_rise(scheduler: str) -> str:
    return "full until the freeze, falling to 0 after it" if scheduler == "warmup_stable_decay" else scheduler
