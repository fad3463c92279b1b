"""Which units stay in every layer, and the scores that decided it; titles say what to see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter

from prunetune.model.plan import Plan
from prunetune.model.units import HIDDEN, KINDS, LAYERS_SITE, parse_site, site_name
from prunetune.report.palette import BLUE, GREY, INK, STYLE

KIND_NAMES = {
    "mlp_channels": "MLP channels",
    "kv_groups": "KV groups",
    "query_heads": "query heads",
    "layers": "layers",
    HIDDEN: "hidden dimensions",
}

FEW_UNITS = 64  # up to so many units of a site are drawn one by one


def kept_units_figure(plan: Plan, scores: Mapping[str, np.ndarray[Any, Any]] | None = None) -> Figure | None:
    """Which units stay in every layer, one panel a kind; None if the plan keeps everything in all layers.

    With ``scores``, a dot says which share of the layer's score the units that stay carry.
    """
    kinds = [kind for kind in KINDS if kind != LAYERS_SITE and any(_is(name, kind) for name in plan.kept)]
    if not kinds and LAYERS_SITE not in plan.kept:
        return None
    layers = int(plan.architecture["layers"])
    staying = set(plan.kept.get(LAYERS_SITE, range(layers)))
    dots = None
    with matplotlib.rc_context(STYLE):
        width = max(5.5, 1.0 + 3.6 * max(1, len(kinds)))
        figure = Figure(figsize=(width, 2.0 + 0.16 * layers), layout="constrained")
        axes = figure.subplots(1, max(1, len(kinds)), sharey=True, squeeze=False)[0]
        for axis, kind in zip(axes, kinds or ["layers"], strict=True):
            dots = _draw_units(axis, plan, kind, layers, staying, scores or {}) or dots
        axes[0].set_ylabel("layer of the base model (0 = next to the input)")
        axes[0].set_ylim(layers - 0.5, -0.5)
        axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
        handles: dict[str, Any] = {"stays": Patch(color=BLUE), "removed": Patch(color=GREY)}
        if dots is not None:
            handles["share of the layer's score that stays (right edge = 100%)"] = dots
        columns = 3 if len(kinds) > 1 else 1  # one narrow panel would cut a legend of three columns off
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def scores_figure(scores: Mapping[str, np.ndarray[Any, Any]], plan: Plan | None) -> Figure | None:
    """Histogram of the units' scores (or gates) at the freeze, kept and removed apart, one panel a kind."""
    kinds = [kind for kind in (*KINDS, HIDDEN) if any(_is(name, kind) for name in scores)]
    if not kinds:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.5, 1.0 + 3.6 * len(kinds)), 3.6), layout="constrained")
        for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            _draw_histogram(axis, kind, *_split_scores(scores, plan, kind))
    return figure


def _draw_units(
    axis: Any,
    plan: Plan,
    kind: str,
    layers: int,
    staying: set[int],
    scores: Mapping[str, np.ndarray[Any, Any]],
) -> Any:
    """One panel; returns the dots of the score shares, or None."""
    size = 1 if kind == LAYERS_SITE else int(plan.architecture[kind])
    kept = {
        layer: plan.kept.get(site_name(layer, kind), tuple(range(size))) if layer in staying else ()
        for layer in range(layers)
    }
    for layer, units in kept.items():
        _draw_row(axis, layer, units, size)
    axis.set_xlim(0, size)
    axis.tick_params(axis="y", length=0)
    if kind == LAYERS_SITE:
        axis.set_xticks([])
        axis.set_title(f"{len(staying)} of {layers} layers stay")
        return None
    counts = sorted({len(kept[layer]) for layer in staying})
    stay = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    axis.set_title(f"{KIND_NAMES[kind]}: {stay} of {size} stay in a layer")
    if size <= FEW_UNITS:
        shown = np.arange(0, size, max(1, size // 8))
        axis.set_xticks(shown + 0.5, [str(unit) for unit in shown])
        axis.set_xlabel("which unit")
        return None
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.set_xlabel("how many (not which)")
    shares = {layer: _score_share(scores.get(site_name(layer, kind)), kept[layer]) for layer in staying}
    known = {layer: share for layer, share in shares.items() if share is not None}
    if not known:
        return None
    return axis.plot([share * size for share in known.values()], list(known), "o", color=INK, markersize=4)[0]


def _score_share(values: np.ndarray[Any, Any] | None, kept: Sequence[int]) -> float | None:
    """Share of a site's score that its kept units carry; None if scores cannot be added up to one."""
    if values is None or values.min() < 0 or not values.sum() > 0:
        return None
    return float(values[list(kept)].sum() / values.sum())


def _draw_row(axis: Any, layer: int, kept: Sequence[int], size: int) -> None:
    """One layer: squares that show which units stay if there are few, else a bar of how many."""
    axis.barh(layer, size, height=0.8, color=GREY, linewidth=0)
    if size > FEW_UNITS:
        axis.barh(layer, len(kept), height=0.8, color=BLUE, linewidth=0)
        return
    for unit in kept:
        axis.barh(layer, 1, left=unit, height=0.8, color=BLUE, linewidth=0)
    for unit in range(1, size):
        axis.plot([unit, unit], [layer - 0.4, layer + 0.4], color="white", linewidth=1.5)


def _split_scores(
    scores: Mapping[str, np.ndarray[Any, Any]], plan: Plan | None, kind: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(scores of units that stay, of units that leave) over all sites of a kind."""
    stay, leave = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for name, values in scores.items():
        if not _is(name, kind):
            continue
        kept = np.zeros(len(values), bool)
        kept[list(range(len(values)) if plan is None else plan.kept.get(name, range(len(values))))] = True
        layer, _ = parse_site(name)
        if plan is not None and layer >= 0 and layer not in plan.kept.get(LAYERS_SITE, (layer,)):
            kept[:] = False
        stay.append(values[kept])
        leave.append(values[~kept])
    return np.concatenate(stay), np.concatenate(leave)


def _draw_histogram(axis: Any, kind: str, stay: np.ndarray[Any, Any], leave: np.ndarray[Any, Any]) -> None:
    both = np.concatenate([stay, leave])
    both = both[np.isfinite(both)]
    gates = bool(both.size) and both.min() >= 0 and both.max() <= 1 and both.max() > 0.5
    bars = int(np.clip(2 * np.sqrt(both.size), 8, 40))
    positive = both[both > 0]
    if not gates and both.size and both.min() >= 0 and positive.size and positive.max() > 100 * positive.min():
        edges = np.geomspace(positive.min(), positive.max() * 1.001, bars + 1)
        # Zeros would vanish from a logarithmic axis: they are counted in its first bar.
        stay, leave = np.maximum(stay, edges[0]), np.maximum(leave, edges[0])
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        low, high = (0.0, 1.0) if gates or not both.size else (float(both.min()), float(both.max()))
        edges = np.linspace(low, high if high > low else low + 1, bars + 1)
    axis.hist([stay, leave], bins=edges, stacked=True, color=[BLUE, GREY], label=["stays", "removed"])
    axis.set_xlabel("gate (1 = open)" if gates else "score (higher = more worth keeping)")
    axis.set_ylabel(f"number of {KIND_NAMES[kind]}")
    axis.set_title(f"{KIND_NAMES[kind]}: {len(stay)} of {both.size} stay")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False)


def _is(name: str, kind: str) -> bool:
    return parse_site(name)[1] == kind
