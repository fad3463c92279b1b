"""Delta methods: how much of what was learnt is kept. One file is one method: a delta in, a lazier delta out.

A method never makes the whole matrix: it wraps a delta in one that changes each block of rows as it is asked for.
Random masks are drawn in the coordinates of the dense, unsharded tensor and named by model and tensor, so block size,
shard order, number of processes and pruning of the base change nothing.
Legend: m x n the delta's shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from prunetune.core.errors import ConfigError, Problem
from prunetune.core.registry import Registry
from prunetune.core.sizes import parse_fraction
from prunetune.methods.options import MethodOptions, parse_options, problems_of
from prunetune.model.delta_inputs import Inputs
from prunetune.model.deltas import Delta, LowRank, Place, words_of


@dataclass(frozen=True)
class DeltaContext:
    """What a method may know beside the delta.

    Args:
        seed: of all random masks.
        model: name of the adapter or tuned model; masks of different models are independent.
        inputs: (n,) mean square of each input channel over calibration tokens, or None.
        energy: mean of |Dx|^2 over the same tokens, D the whole delta and x the inputs, or None.
        means: (n,) mean of each input channel over the same tokens, or None.
        ranks: this tensor's share of a ranking of all tensors: (largest entries that leave, entries that stay after
            them), or None.
    """

    seed: int = 0
    model: str = ""
    inputs: Tensor | None = None
    energy: float | None = None
    means: Tensor | None = None
    ranks: tuple[int, int] | None = None


def context_of(seed: int, model: str, seen: Inputs | None = None, ranks: tuple[int, int] | None = None) -> DeltaContext:
    """The context of a tensor whose linear saw these inputs."""
    if seen is None:
        return DeltaContext(seed, model, ranks=ranks)
    return DeltaContext(seed, model, seen.squares, seen.energy, seen.means, ranks)


# What a search goes by: the loss of the rows' labels, or how far outputs move.
By = Literal["loss", "outputs"]


@dataclass(frozen=True)
class Search:
    """An option whose value is chosen by trying it on rows.

    Args:
        option: its name. values: to try, ascending. fixed: what the other options become once it is chosen.
    """

    option: str
    values: tuple[float, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)


class DropOptions(MethodOptions):
    """The option that nearly all methods have."""

    drop: float = Field(0.9, ge=0.0, le=1.0, description="fraction of the delta's entries that is dropped")


class DeltaMethod(ABC):
    """A method that prunes deltas.

    Args:
        options: the method's own options.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    paper: ClassVar[str] = ""
    # Whether chance decides what stays: safe for small changes only.
    random: ClassVar[bool] = False
    # Whether survivors are those of ``dare.masked``: a seed and two names draw their places again.
    drawn: ClassVar[bool] = False
    # With the options it was given: whether it needs inputs seen on calibration rows, which option is left to a search,
    # and whether it ranks the entries of all tensors together.
    calibrated: bool = False
    search: Search | None = None
    ranks_all: bool = False

    def __init__(self, options: MethodOptions):
        self.options = options

    @abstractmethod
    def apply(self, delta: Delta, context: DeltaContext) -> Delta:
        """The pruned delta, same shape and place."""

    def kept(self, delta: Delta, context: DeltaContext) -> Delta:
        """What stays, before it is divided by ``divisor``."""
        return self.apply(delta, context)

    def divisor(self, delta: Delta, context: DeltaContext) -> float:
        """What survivors are divided by to make ``apply``'s delta of ``kept``'s; 0 if there are none."""
        return 1.0

    def on_factors(self, delta: LowRank, context: DeltaContext) -> LowRank | None:
        """The pruned delta as an adapter's factors; None: the method cannot keep it one."""
        return None

    def ranks_of(self, deltas: Mapping[str, Delta]) -> dict[str, tuple[int, int]]:
        """Every tensor's share of a common ranking, see ``DeltaContext.ranks``; asked only if ``ranks_all``."""
        raise NotImplementedError(f"{type(self).__name__} says ranks_all and ranks nothing")


def random_words(place: Place, context: DeltaContext, purpose: str, start: int, stop: int) -> Tensor:
    """(stop - start, n) int64 in [0, 2^32): the words that decide about these rows, in dense coordinates."""
    return words_of(place, context.seed, context.model, purpose, start, stop)


DELTAS: Registry[type[DeltaMethod]] = Registry("delta method", "prunetune.methods.deltas")


def build_delta(method: str, options: Mapping[str, Any]) -> DeltaMethod:
    """The delta method called ``method``; raises ConfigError for unknown names, options and values."""
    kind = DELTAS.get(method)
    given = dict(options)
    for name in ("drop", "rescale", "q"):
        if isinstance(given.get(name), str) and given[name][:1].isdigit():
            try:
                given[name] = parse_fraction(given[name])
            except ValueError as error:
                raise ConfigError([Problem(str(error), f"delta.{name}")]) from None
    return kind(parse_options("delta", method, kind.Options, given))


def prune_all(
    method: DeltaMethod, deltas: Mapping[str, Delta], seed: int, model: str, seen: Mapping[str, Inputs]
) -> dict[str, Delta]:
    """What a method leaves of every tensor's delta.

    Args:
        deltas: by tensor. seed: of random masks. model: names them.
        seen: what each tensor's linear saw. A method that needs that leaves a tensor whole that is no linear's (an
            embedding).
    """
    ranks = method.ranks_of(deltas) if method.ranks_all else {}
    return {
        name: delta
        if method.calibrated and seen and name not in seen
        else method.apply(delta, context_of(seed, model, seen.get(name), ranks.get(name)))
        for name, delta in deltas.items()
    }


def check_delta(method: str, options: Mapping[str, Any]) -> list[Problem]:
    """The problems that ``build_delta`` would raise."""
    return problems_of(lambda: build_delta(method, options))
