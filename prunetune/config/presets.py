"""Everything that is derived from a setting rather than set, in one place, each with its printed reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from prunetune.config.schema import PhaseConfig, RunConfig, TrainSection
from prunetune.config.selection_rules import INFOBATCH, active_steps, row_count


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
        PhaseSteps(warmup_end=4, freeze=20, total=80)
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


def decay_steps(phases: PhaseConfig, steps: int) -> int:
    """Optimizer steps in which the learning rate falls to zero: the last half, but not before the freeze.

    Example:
        >>> [decay_steps(PhaseConfig(search=share), 80) for share in (0.2, 0.45, 0.75)]
        [40, 40, 16]
    """
    return max(1, min(phase_steps(phases, steps).recover, steps // 2))


def export_folder(config: RunConfig) -> Path:
    """Where the compact model is written."""
    return config.export.folder or config.folder / "compact"


def derive(config: RunConfig, steps: int | None) -> list[Derived]:
    """All derived values of a run of ``steps`` optimizer steps (None: not known yet), for printing."""
    train = config.train
    tokens = train.batch_size * train.accumulate * train.max_length
    per_step = f"batch {train.batch_size} x {train.accumulate} x {train.max_length} tokens, a process"
    derived = [*_phases(config, steps), Derived("tokens per step", f"up to {tokens:,}", per_step)]
    derived += _selection(config, steps)
    if config.distill.weight:
        reason = f"distill.weight {config.distill.weight:.0%}; one more forward pass in each of these steps"
        derived.append(Derived("distilled", "in the search", reason))
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


def _selection(config: RunConfig, steps: int | None) -> list[Derived]:
    """What is chosen while training, if anything is."""
    samples, tokens, online = config.data.samples, config.data.tokens, config.data.online
    derived = []
    if samples.method == INFOBATCH:
        derived.append(Derived("rows", "by their loss", f"{INFOBATCH}: chosen once an epoch, the first sees all"))
    elif samples.method is not None:
        rows = row_count(samples.kept, config.train.batch_size * config.train.accumulate)
        of_all = f"of {config.train.batch_size * config.train.accumulate} a step and process"
        derived.append(Derived("rows", f"{rows} {of_all}", f"data.samples {samples.method}, kept {samples.kept:.4g}"))
    if tokens.method is not None:
        scope = "over a step's rows" if tokens.scope == "all" else "of every row"
        reason = f"data.tokens {tokens.method}, {scope}; the others are context"
        derived.append(Derived("target tokens", f"{tokens.kept:.0%}", reason))
    if derived and (online.warmup or online.anneal):
        shares = f"data.online.warmup {online.warmup:.0%}, anneal {online.anneal:.0%}; else all rows"
        value = f"{1 - online.warmup - online.anneal:.0%} of all steps"
        if steps is not None:
            active = active_steps(online, steps)
            value = f"steps {active.begin} to {active.end}"
        derived.append(Derived("chosen in", value, shares))
    if derived and online.rescore_after:
        reason = "data.online.rescore_after; a row's statistics are used again until then"
        derived.append(Derived("scored anew", f"after {_steps(online.rescore_after)}", reason))
    return derived


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _after_rise(scheduler: str) -> str:
    return (
        "full until the freeze and half of the steps, falling to 0 then"
        if scheduler == "warmup_stable_decay"
        else scheduler
    )
