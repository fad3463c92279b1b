"""Rules and derived values of data.samples, data.tokens and data.online: what is chosen while training.

Which methods exist, and what they can do, is not known here: see pipeline.checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prunetune.config.schema import DataConfig, OnlineConfig, RunConfig, SampleConfig, SelectionConfig, TokenConfig

# The method that chooses once an epoch from the losses of the training forward; it has no scoring pass.
INFOBATCH = "infobatch"


@dataclass(frozen=True)
class ActiveSteps:
    """Steps in which rows and tokens are chosen: [begin, end); the others train on everything."""

    begin: int
    end: int

    def __contains__(self, step: int) -> bool:
        return self.begin <= step < self.end


def active_steps(online: OnlineConfig, steps: int) -> ActiveSteps:
    """The steps of a run of ``steps`` optimizer steps in which something is chosen.

    Example:
        >>> active_steps(OnlineConfig(warmup=0.1, anneal=0.25), 80)
        ActiveSteps(begin=8, end=60)
    """
    return ActiveSteps(round(online.warmup * steps), steps - round(online.anneal * steps))


def row_count(kept: float, rows: int) -> int:
    """How many of ``rows`` rows a kept fraction is: rounded, at least one."""
    return min(max(round(kept * rows), 1), rows)


def run_faults(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(dotted key, message) of everything that cannot work in a run."""
    yield from selection_faults(config.data)
    if config.selection() is not None and config.train.packing:
        yield (
            "train.packing",
            "joins rows before they could be told apart, and data.samples and data.tokens choose among rows; "
            "set it to false",
        )


def selection_faults(select: DataConfig | SelectionConfig) -> Iterator[tuple[str, str]]:
    """(dotted key, message) of everything that cannot work in what is chosen."""
    samples, tokens, online = select.samples, select.tokens, select.online
    for name, part in (("samples", samples), ("tokens", tokens)):
        yield from _without_method(f"data.{name}", part)
    if samples.method is None and tokens.method is None:
        for name in ("warmup", "anneal", "rescore_after"):
            if getattr(online, name):
                yield (
                    f"data.online.{name}",
                    "says when rows or tokens are chosen, but nothing chooses; set data.samples.method, or remove it",
                )
        return
    if online.warmup + online.anneal == 1:
        yield "data.online", "warmup and anneal cover all the steps, so nothing would ever be chosen; lower one"
    if samples.method == INFOBATCH:
        yield from _infobatch(samples, tokens, online)


def _without_method(section: str, part: SampleConfig | TokenConfig) -> Iterator[tuple[str, str]]:
    if part.method is not None:
        return
    if part.kept < 1:
        yield (
            f"{section}.kept",
            f"is {part.kept:.0%}, but {section}.method does not say what decides; name a method, or remove it",
        )
    for key in part.options():
        yield f"{section}.{key}", f"is an option of a method, but {section}.method is not set; name one, or remove it"
    if isinstance(part, TokenConfig):
        for key in ("scope", "floor", "final_answer"):
            if getattr(part, key) != TokenConfig.model_fields[key].default:
                yield f"{section}.{key}", f"is not used without {section}.method; name a method, or remove it"


def _infobatch(samples: SampleConfig, tokens: TokenConfig, online: OnlineConfig) -> Iterator[tuple[str, str]]:
    if samples.kept < 1:
        yield (
            "data.samples.kept",
            f"is {samples.kept:.0%}, but how many rows {INFOBATCH} keeps follows from their losses; remove it, and set "
            "data.samples.prune (the share dropped of the rows below the mean loss)",
        )
    if tokens.method is None and online.rescore_after:
        yield "data.online.rescore_after", f"is not used: {INFOBATCH} takes losses from training itself; remove it"
    if tokens.method is not None and samples.options().get("weighted", True) is not False:
        yield (
            "data.samples.weighted",
            "weights make the kept rows' whole losses stand for the dropped ones', which dropped tokens would undo; "
            "set it to false, or remove data.tokens.method",
        )


def selection_cautions(config: RunConfig) -> Iterator[str]:
    """What works but may not be meant."""
    samples, tokens, online = config.data.samples, config.data.tokens, config.data.online
    if samples.method == INFOBATCH:
        if online.anneal == 0:
            yield f"data.online.anneal is 0%: {INFOBATCH} was published with the last 12.5% of the steps on all rows"
    elif samples.method is not None and samples.kept == 1:
        yield "data.samples.kept is 100%: every row is scored, and only a method that filters would drop one"
    if tokens.method is not None and tokens.kept == 1:
        yield "data.tokens.kept is 100%: target tokens are scored and all of them stay"


def step_cost(config: RunConfig, steps: int, passes: int) -> float:
    """Training FLOPs of the chosen rows and of scoring, over those of a run on all rows.

    A forward pass counts 1; the backward pass of frozen weights counts 1, recomputed activations 1 more. Statistics
    that are used again, and what InfoBatch saves, are not known beforehand and count as nothing saved.

    Args:
        config: the run's settings.
        steps: optimizer steps of the run.
        passes: forward passes over all rows that the methods need beforehand.
    """
    active = active_steps(config.data.online, steps)
    whole = 3.0 if config.train.activation_checkpointing else 2.0
    chosen = passes / whole + config.data.samples.kept
    share = max(0, active.end - active.begin) / steps
    return 1.0 - share + share * chosen
