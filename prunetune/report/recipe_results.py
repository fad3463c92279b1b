"""Results of a comparison, brought together over seeds.

Perplexities are averaged geometrically (means of their logarithms), everything else plainly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

RANDOM = "random"


@dataclass(frozen=True)
class Summary:
    """One recipe at one budget, over its seeds.

    Args:
        label: the recipe. kept: the budget; None for a reference.
        means: number -> mean over the seeds. spreads: perplexity -> standard deviation of its logarithm (about the
            relative deviation); empty for one seed.
        seeds: how many.
        beats_random: whether the domain perplexity is below that of every control with random units at this
            budget; None if there is none, or this is one.
    """

    label: str
    kept: float | None
    means: dict[str, float]
    spreads: dict[str, float]
    seeds: int
    beats_random: bool | None


def summaries(results: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Results by recipe and budget, in the order of their first appearance."""
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["label"], result["kept"]), []).append(result)
    means = {key: _means(group) for key, group in groups.items()}
    found = []
    for (label, kept), group in groups.items():
        controls = [
            means[key]["domain_ppl"] for key in groups if key[1] == kept and kept is not None and _is_random(key[0])
        ]
        own = means[label, kept]["domain_ppl"]
        beats = own < min(controls) if controls and not _is_random(label) else None
        found.append(Summary(label, kept, means[label, kept], _spreads(group), len(group), beats))
    return found


def _is_random(label: str) -> bool:
    return RANDOM in label.replace(",", " ").split()[:2]


def _means(group: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = [
        name for name, value in group[0].items() if isinstance(value, int | float) and name not in ("kept", "seed")
    ]
    return {name: _mean(name, [float(result[name]) for result in group]) for name in names}


def _mean(name: str, values: list[float]) -> float:
    return math.exp(fmean(map(math.log, values))) if name.endswith("_ppl") else fmean(values)


def _spreads(group: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    if len(group) < 2:
        return {}
    names = [name for name in group[0] if name.endswith("_ppl")]
    return {name: stdev(math.log(result[name]) for result in group) for name in names}
