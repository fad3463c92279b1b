"""Scores: one-shot criteria that rank units of a model before any training. One file is one criterion.

A LayerScore looks at one layer's weights and statistics at a time, so the model is never loaded whole; a ModelScore
asks for the whole model, because it needs gradients or outputs. Shapes: U units of a site, F inputs of a linear.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prunetune.core.errors import ConfigError, Problem, PrunetuneError
from prunetune.core.registry import Registry
from prunetune.methods.judging import Judge, Measure
from prunetune.methods.options import MethodOptions, parse_options, problems_of
from prunetune.model.architecture import Architecture
from prunetune.model.families import Columns, Rows
from prunetune.model.layer_statistics import LayerStatistics
from prunetune.model.token_rows import TokenRow
from prunetune.model.units import LAYERS_SITE, Site, kind_size, span_features

INNER = ("mlp_channels", "kv_groups", "query_heads")
# What a criterion may look at.
NEEDS = frozenset({"weights", "activations", "gradients", "lora"})


@dataclass(frozen=True)
class ScoreContext:
    """What a score may know: the dense model, the sites it is asked about, the seed."""

    arch: Architecture
    sites: tuple[Site, ...]
    seed: int


@dataclass(frozen=True)
class LayerFacts:
    """One layer, in memory alone.

    Args:
        layer: its index.
        weights: role -> (out, in) float32.
        statistics: of the calibration tokens; None for scores that need no activations.
    """

    layer: int
    weights: Mapping[str, Tensor]
    statistics: LayerStatistics | None


@dataclass(frozen=True)
class ModelFacts:
    """The whole model, loaded.

    Args:
        model: a transformers causal LM in eval mode; its parameters have no gradients yet.
        rows: number of a draw -> calibration rows; draw 0 is the sample that all criteria see.
        judge: makes what measures the effect of removing units on the output, on rows that are in no draw (see Judge).
        price: scores -> divergence of the model that is cut to the user's budget by them.
    """

    model: Any
    rows: Callable[[int], Sequence[TokenRow]]
    judge: Callable[[], Judge]
    price: Callable[[Mapping[str, Tensor]], float]


class Score:
    """A criterion for units.

    Args:
        context: the model's architecture, the sites, the seed.
        options: the criterion's own options.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"weights"})
    cost: ClassVar[str] = "reads the weights once"
    # Kinds of units that it can rank.
    kinds: ClassVar[tuple[str, ...]] = (*INNER, LAYERS_SITE)
    # How scores of different sites compare: estimates of one loss (per parameter, then), only within their site, or
    # standardised already.
    measure: ClassVar[Measure] = "local"

    def __init__(self, context: ScoreContext, options: MethodOptions):
        self.context = context
        self.options = options
        self._found: dict[str, Tensor] = {}

    @property
    def balance(self) -> float | None:
        """Fraction removed from MLPs over the fraction removed from attention, if the method fixes it."""
        return None

    def score(self, site: Site) -> Tensor:
        """(U,) float32, higher = keep, finite, at least 0.

        Raises:
            PrunetuneError: the criterion found something that is not a number.
        """
        found = self._found[site.name].float().cpu()
        if not bool(torch.isfinite(found).all()):
            raise PrunetuneError(
                f"the scores of {site.name} are not finite: the model's weights or activations overflow. Calibrate in "
                "float32, or look at the model"
            )
        return found

    def scores(self) -> dict[str, Tensor]:
        """site -> scores, for all sites of the context."""
        return {site.name: self.score(site) for site in self.context.sites}


class LayerScore(Score, ABC):
    """A criterion that needs one layer at a time."""

    def collect(self, facts: LayerFacts) -> None:
        """Takes one layer; called once for every layer, in order."""
        arch = self.context.arch
        for site in self.context.sites:
            if site.layer == facts.layer:
                self._found[site.name] = self.units(facts, site.kind)
            elif site.kind == LAYERS_SITE:
                values = self._found.setdefault(site.name, torch.zeros(arch.layers, dtype=torch.float64))
                values[facts.layer] = self.whole_layer(facts)

    @abstractmethod
    def units(self, facts: LayerFacts, kind: str) -> Tensor:
        """(U,) scores of the units of one kind in this layer."""

    def whole_layer(self, facts: LayerFacts) -> float:
        """The layer as one unit: what its KV groups and MLP channels add up to."""
        return sum(float(self.units(facts, kind).double().sum()) for kind in ("kv_groups", "mlp_channels"))


class ModelScore(Score, ABC):
    """A criterion that needs the whole model at once."""

    @property
    def priced(self) -> bool:
        """Whether what it finds depends on the user's budget (it asks ``price``)."""
        return False

    @abstractmethod
    def collect(self, facts: ModelFacts) -> None:
        """Runs the model and finds the scores of all sites."""


SCORES: Registry[type[Score]] = Registry("score", "prunetune.methods.scores")


def build_score(method: str, options: Mapping[str, Any], context: ScoreContext) -> Score:
    """The score called ``method``.

    Raises:
        ConfigError: unknown names, options and values; kinds of units that the method cannot rank.
    """
    if problems := check_score(method, options, {site.kind for site in context.sites}):
        raise ConfigError(problems)
    kind = SCORES.get(method)
    return kind(context, parse_options("score", method, kind.Options, options))


def check_score(method: str, options: Mapping[str, Any], kinds: Iterable[str] = ()) -> list[Problem]:
    """The problems of a name, its options and the kinds of units that it is to rank, without building anything."""
    found = problems_of(lambda: parse_options("score", method, SCORES.get(method).Options, options))
    beyond = sorted(set(kinds) - set(SCORES.get(method).kinds)) if method in SCORES.names() else []
    if beyond:
        message = f"{method} ranks {', '.join(SCORES.get(method).kinds)}, not {', '.join(beyond)}"
        found.append(Problem(f"{message}; set the units to what it ranks, or take another score", "score"))
    return found


def consumer(arch: Architecture, kind: str) -> str:
    """Role of the linear whose inputs the units of a kind are."""
    [part] = [part for part in arch.family.units[kind] if isinstance(part, Columns)]
    return part.role


def per_unit(arch: Architecture, kind: str, values_F: Tensor) -> Tensor:
    """(U,): sums of values of the consumer's inputs over the inputs that each unit spans."""
    return values_F.reshape(kind_size(arch, kind), -1).sum(1)


def owned(
    arch: Architecture,
    kind: str,
    elements: Callable[[str], Tensor],
    lines: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(U,): sums of elements of the weight matrices over all rows and columns that each unit owns.

    Args:
        elements: role -> (out, in), one number for each element of the weight; asked one matrix at a time.
        lines: what is done to the sum of each row or column before they are added up.
    """
    total = torch.zeros(kind_size(arch, kind))
    for part in arch.family.units[kind]:
        if isinstance(part, Rows | Columns):
            sums = elements(part.role).sum(1 if isinstance(part, Rows) else 0)
            sums = sums if lines is None else lines(sums)
            total = total.to(sums) + sums.reshape(-1, span_features(arch, part.span)).sum(1)
    return total
