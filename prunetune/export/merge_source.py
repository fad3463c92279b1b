"""One model of a merge: its weight and its delta method, which may differ from tensor to tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prunetune.methods.deltas import DeltaContext, DeltaMethod, context_of
from prunetune.model.delta_inputs import Inputs
from prunetune.model.deltas import Delta
from prunetune.model.tuned import Tuned

# What sends tokens to experts: small, and a few entries less change which experts are asked.
_ROUTER = re.compile(r"(^|\.)(router|gate)\.weight$")


@dataclass(frozen=True)
class Special:
    """What holds for some tensors only.

    Args:
        pattern: is searched for in the tensor's name. weight: instead of the source's. method: the same.
    """

    pattern: re.Pattern[str]
    weight: float | None = None
    method: DeltaMethod | None = None


@dataclass(frozen=True)
class Source:
    """One model that is merged.

    Args:
        tuned: what was learnt. weight: of its delta in the sum. method: prunes its delta first.
        name: names its random masks. measured: tensor of the base -> what its linear saw.
        special: the first one whose pattern is found in a tensor's name holds for it.
    """

    tuned: Tuned
    weight: float
    method: DeltaMethod
    name: str
    measured: Mapping[str, Inputs] = field(default_factory=dict)
    special: Sequence[Special] = ()

    def weight_of(self, name: str) -> float:
        """Of a tensor's delta in the sum."""
        found = self._special(name)
        return self.weight if found is None or found.weight is None else found.weight

    def method_of(self, name: str) -> DeltaMethod | None:
        """What prunes a tensor's delta; None: nothing does, because its method looks at inputs of linears and the
        tensor is no linear's, or it is a router and nobody asked for that."""
        found = self._special(name)
        if (found is None or found.method is None) and _ROUTER.search(name):
            return None
        method = self.method if found is None or found.method is None else found.method
        return None if method.calibrated and self.measured and name not in self.measured else method

    def context(self, name: str, seed: int, ranks: tuple[int, int] | None = None) -> DeltaContext:
        """What the method may know about a tensor of the base."""
        return context_of(seed, self.name, self.measured.get(name), ranks)

    def _special(self, name: str) -> Special | None:
        return next((special for special in self.special if special.pattern.search(name)), None)


def ranks_of(source: Source, names: Iterable[str], delta_of: Callable[[str], Delta]) -> dict[str, tuple[int, int]]:
    """Tensor -> its share of a ranking of all tensors, where its method ranks all of them together."""
    together: dict[DeltaMethod, dict[str, Delta]] = {}
    for name in names:
        method = source.method_of(name)
        if method is not None and method.ranks_all:
            together.setdefault(method, {})[name] = delta_of(name)
    return {name: rank for method, part in together.items() for name, rank in method.ranks_of(part).items()}
