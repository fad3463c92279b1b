"""Which sample and token methods can choose from the rows of one optimizer step, and what for each that cannot.

Needs no torch, so that `prunetune plan` can ask too.
"""

from __future__ import annotations

from collections.abc import Iterator

from prunetune.config.schema import SelectionConfig
from prunetune.core.errors import Problem, suggest
from prunetune.methods.samples import SAMPLES, SampleMethod, check_samples
from prunetune.methods.tokens import TOKENS, TokenMethod, check_tokens

# Columns that a scoring pass in the middle of training fills, and those that are read off the rows without one.
SCORED_TOKENS = ("nll", "entropy", "top1", "el2n")
SCORED_ROWS = ("residual", "grad_norm")
REFERENCE = "reference_nll"
SCORED = frozenset({*SCORED_TOKENS, *SCORED_ROWS, REFERENCE})
COLUMNS = SCORED | {"length", "token", "position", "protected"}


def check_online(select: SelectionConfig) -> list[Problem]:
    """Problems with the names, options and abilities of the chosen methods; ``field`` is a dotted key."""
    return [*_samples(select), *_tokens(select)]


def needed_columns(select: SelectionConfig) -> frozenset[str]:
    """Columns that the chosen methods read, those of per-epoch methods left out: they see losses of their own."""
    needs: frozenset[str] = frozenset()
    if select.samples.method is not None:
        sample = SAMPLES.get(select.samples.method)
        needs |= frozenset() if sample.per_epoch else sample.needs
    if select.tokens.method is not None:
        needs |= TOKENS.get(select.tokens.method).needs
    return needs


def scoring_passes(select: SelectionConfig | None) -> int:
    """Forward passes without gradients over all rows of a step, before those that stay are trained on."""
    needs = frozenset() if select is None else needed_columns(select)
    return (1 if needs & SCORED else 0) + (1 if REFERENCE in needs else 0)


def _samples(select: SelectionConfig) -> Iterator[Problem]:
    name = select.samples.method
    if name is None:
        return
    if name not in SAMPLES.names():
        yield Problem(f"there is no sample method {name!r}; {suggest(name, SAMPLES.names())}", "data.samples.method")
        return
    yield from check_samples(name, select.samples.options())
    kind = SAMPLES.get(name)
    yield from _abilities("data.samples.method", name, kind, _names(SAMPLES.items()))


def _tokens(select: SelectionConfig) -> Iterator[Problem]:
    name = select.tokens.method
    if name is None:
        return
    if name not in TOKENS.names():
        yield Problem(f"there is no token method {name!r}; {suggest(name, TOKENS.names())}", "data.tokens.method")
        return
    yield from check_tokens(name, select.tokens.options())
    kind = TOKENS.get(name)
    if kind.removes:
        yield Problem(
            f"{name} takes text out of the rows, which changes what is learnt and needs the data set as a whole; use "
            "`prunetune data select` and train on its output",
            "data.tokens.method",
        )
        return
    yield from _abilities("data.tokens.method", name, kind, _names(TOKENS.items()))


def _abilities(
    field: str, name: str, kind: type[SampleMethod] | type[TokenMethod], able: list[str]
) -> Iterator[Problem]:
    instead = f"choose beforehand with `prunetune data select`, or use one of {', '.join(able)}"
    missing = sorted(kind.needs - COLUMNS)
    if not kind.online:
        yield Problem(f"{name} cannot choose among the rows of one step; {instead}", field)
    elif missing:
        yield Problem(f"{name} needs {', '.join(missing)}, which training does not find; {instead}", field)


def _names(methods: Iterator[tuple[str, type[SampleMethod]]] | Iterator[tuple[str, type[TokenMethod]]]) -> list[str]:
    able = []
    for name, kind in methods:
        if kind.online and not getattr(kind, "removes", False) and kind.needs <= COLUMNS:
            able.append(name)
    return able
