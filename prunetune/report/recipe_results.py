"""Results of a comparison, brought together over seeds.

Perplexities are averaged geometrically (means of their logarithms), everything else plainly. A perplexity that is not
finite is infinitely bad: so is its recipe's mean, it has no part in a spread, and nothing has to be better than it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

RANDOM = "random"
DOMAIN, KEPT = "domain_ppl", "kept_decoder"
# Evaluation cuts perplexities off at e^700, so that a number may stand for an infinite one.
_LARGEST = 1e100
# Recipes whose kept fractions of the decoder are further apart than this are not alike in size.
_ALIKE = 0.02


@dataclass(frozen=True)
class Summary:
    """One recipe at one budget, over its seeds.

    Args:
        label: the recipe. kept: the budget; None for a reference.
        means: number -> mean over the seeds; empty if there is no result.
        spreads: perplexity -> standard deviation of its logarithm (about the relative deviation) over the seeds where
            it is finite; empty for one seed.
        seeds: how many have a result. planned: how many were to have one. diverged: how many have no finite domain
            perplexity.
        beats_random: whether the domain perplexity is below that of every control with random units at this
            budget; None if there is none, or this is one.
        random_kept: what the control that is not beaten kept of the decoder, if that is not about as much.
    """

    label: str
    kept: float | None
    means: dict[str, float]
    spreads: dict[str, float]
    seeds: int
    planned: int
    diverged: int = 0
    beats_random: bool | None = None
    random_kept: float | None = None

    @property
    def domain_ppl(self) -> float:
        """Mean domain perplexity; infinite if it diverged, or there is no result."""
        return self.means.get(DOMAIN, math.inf)


def is_random(label: str) -> bool:
    """Whether this is a control whose units are chosen at random."""
    return RANDOM in label.replace(",", " ").split()[:2]


def show_ppl(value: float) -> str:
    """A perplexity for people, as short as it can be."""
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}" if value < 10_000 else f"{value:.0e}"


def summaries(results: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Results by recipe and budget, in the order of their first appearance.

    Args:
        results: what ``run_cell`` returned; of a run without a result only its label, kept and seed.
    """
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["label"], result["kept"]), []).append(result)
    there = {key: [result for result in group if DOMAIN in result] for key, group in groups.items()}
    means = {key: _means(group) for key, group in there.items()}
    found = []
    for (label, kept), group in there.items():
        controls = [means[key] for key in means if key[1] == kept and is_random(key[0])]
        beats, random_kept = None, None
        if group and kept is not None and not is_random(label):
            beats, random_kept = _against(means[label, kept], controls)
        found.append(
            Summary(
                label=label,
                kept=kept,
                means=means[label, kept],
                spreads=_spreads(group),
                seeds=len(group),
                planned=len(groups[label, kept]),
                diverged=sum(not _finite(result[DOMAIN]) for result in group),
                beats_random=beats,
                random_kept=random_kept,
            )
        )
    return found


def _against(own: Mapping[str, float], controls: Sequence[Mapping[str, float]]) -> tuple[bool | None, float | None]:
    """(whether all controls are beaten, what the one most alike in size of those that are not kept, if not alike)."""
    finite = [control for control in controls if math.isfinite(control.get(DOMAIN, math.inf))]
    better = [control for control in finite if control[DOMAIN] <= own[DOMAIN]]
    if not better:
        return (True if finite else None), None
    kept = own.get(KEPT, 0.0)
    nearest = min((control.get(KEPT, kept) for control in better), key=lambda other: abs(other - kept))
    return False, (nearest if abs(nearest - kept) > _ALIKE else None)


def _finite(perplexity: float) -> bool:
    return perplexity < _LARGEST


def _means(group: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: _mean(name, [float(result[name]) for result in group]) for name in _numbers(group)}


def _numbers(group: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the numbers that all of a recipe's results have."""
    return [
        name
        for name, value in (group[0].items() if group else ())
        if isinstance(value, int | float) and name not in ("kept", "seed") and all(name in result for result in group)
    ]


def _mean(name: str, values: list[float]) -> float:
    if not name.endswith("_ppl"):
        return fmean(values)
    return math.exp(fmean(map(math.log, values))) if all(map(_finite, values)) else math.inf


def _spreads(group: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = {}
    for name in _numbers(group):
        logs = [math.log(result[name]) for result in group if name.endswith("_ppl") and _finite(result[name])]
        if len(logs) > 1:
            found[name] = stdev(logs)
    return found
