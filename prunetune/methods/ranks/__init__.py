"""Ranks: how many ranks every adapter has from the freeze on. One file, one method.

Adapters are sliced at the freeze anyway, so that is the one moment when their ranks change. Scales of the ranks that
stay do not. Legend: O output and I input features of a linear, r LoRA rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from prunetune.core.errors import Problem
from prunetune.core.registry import Registry
from prunetune.methods.options import MethodOptions, parse_options, problems_of
from prunetune.model.ranks import RankChange


@dataclass(frozen=True)
class SeenAdapter:
    """What a method knows of one adapter of the sliced model.

    Args:
        path: of its linear.
        features: I + O of what is left of the linear: the parameters that one rank takes.
        importance_r: (r,) float32 mean of ``RankMethod.importance`` over the second half of the search.
        output_ratio: mean of |s B A x| / |W x| over the tokens of those steps; 0 unless ``reads_outputs``.
    """

    path: str
    features: int
    importance_r: Tensor
    output_ratio: float = 0.0

    @property
    def params(self) -> int:
        """Of both factors."""
        return len(self.importance_r) * self.features


class RankMethod(ABC):
    """Decides what becomes of the adapters' ranks at the freeze.

    Args:
        options: the method's own options.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = "gradients of the adapters, in the second half of the search"
    cost: ClassVar[str] = "a product of the factors with their gradients in each of these steps"
    # Whether it wants to know anything at all, and whether the linears' outputs belong to that.
    observes: ClassVar[bool] = True
    reads_outputs: ClassVar[bool] = False

    def __init__(self, options: MethodOptions):
        self.options = options

    def importance(self, a_rI: Tensor, b_Or: Tensor, grad_a_rI: Tensor, grad_b_Or: Tensor) -> Tensor:
        """(r,) importance of an adapter's ranks in one optimizer step, not negative."""
        raise NotImplementedError(f"{type(self).__name__} says observes and has no importance")

    @abstractmethod
    def ranks(self, adapters: Sequence[SeenAdapter]) -> dict[str, RankChange]:
        """path -> what becomes of that adapter (``alpha`` is left open); what is not named stays as it is.

        A pure function of its arguments. At least one rank of one adapter must stay.
        """


RANKS: Registry[type[RankMethod]] = Registry("rank method", "prunetune.methods.ranks")


def build_ranks(method: str, options: Mapping[str, Any]) -> RankMethod:
    """The rank method called ``method``; raises ConfigError for unknown names, options and values."""
    kind = RANKS.get(method)
    return kind(parse_options("lora.ranks", method, kind.Options, options))


def check_ranks(method: str, options: Mapping[str, Any]) -> list[Problem]:
    """The problems that ``build_ranks`` would raise."""
    return problems_of(lambda: build_ranks(method, options))


def without_least(
    adapters: Sequence[SeenAdapter], most_params: float, last: Collection[str] = ()
) -> dict[str, RankChange]:
    """Drops ranks in the order of their importance until so many parameters are left; the last rank of all stays.

    Args:
        adapters: all that share the budget. most_params: what may be left of their parameters.
        last: paths of adapters that lose ranks only when the others have none left.
    """
    kept = [list(range(len(adapter.importance_r))) for adapter in adapters]
    order = sorted(
        (adapter.path in last, importance, number, rank)
        for number, adapter in enumerate(adapters)
        for rank, importance in enumerate(adapter.importance_r.tolist())
    )
    params = sum(adapter.params for adapter in adapters)
    for _, _, number, rank in order[:-1]:
        if params <= most_params:
            break
        kept[number].remove(rank)
        params -= adapters[number].features
    return {adapter.path: RankChange(tuple(ranks)) for adapter, ranks in zip(adapters, kept, strict=True)}
