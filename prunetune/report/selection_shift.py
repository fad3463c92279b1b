"""What a selection shifted: shares of sources, labels and lengths, and how far it follows length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from prunetune.report.palette import BLUE, GREY, STYLE
from prunetune.report.selection_figures import Audit, column, dot_size, legend_below

TITLES = {"source": "Sources", "label": "Labels", "length": "Length of the answer"}
_MOST_GROUPS = 12
_MOST_DOTS = 8000
_SUSPICIOUS = 0.7
_SMALL_SHIFT = 0.01


def composition_figure(composition: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure | None:
    """Shares of each group before and after, one panel a kind of group; None if there is none."""
    kinds = [name for name, groups in composition.items() if groups]
    if not kinds:
        return None
    shown = {name: list(composition[name])[:_MOST_GROUPS] for name in kinds}
    heights = [len(groups) + 1.2 for groups in shown.values()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.9 + 0.42 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, name in zip(axes, kinds, strict=True):
            _draw_groups(axis, shown[name], TITLES.get(name, name), len(composition[name]))
        legend_below(figure, axes[0])
    return figure


def _draw_groups(axis: Any, groups: Sequence[Mapping[str, Any]], title: str, number: int) -> None:
    places = np.arange(len(groups))
    before = [group["share"] for group in groups]
    after = [group["kept_share"] for group in groups]
    axis.barh(places - 0.2, before, height=0.38, color=GREY, label="all rows")
    axis.barh(places + 0.2, after, height=0.38, color=BLUE, label="rows that stay")
    for place, group in zip(places, groups, strict=True):
        axis.annotate(
            f"{group['kept_rows']:,} of {group['rows']:,}",
            (max(group["share"], group["kept_share"]), place),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5,
        )  # fmt: skip
    axis.set_yticks(places, [_short(group["name"]) for group in groups])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max([*before, *after, 0.01]))
    axis.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    largest = max(range(len(groups)), key=lambda i: abs(after[i] - before[i]))
    change = f"{_short(groups[largest]['name'])} went from {before[largest]:.0%} to {after[largest]:.0%}"
    if abs(after[largest] - before[largest]) < _SMALL_SHIFT:
        change = "shares are as before"
    rest = f" (the largest {len(groups)} of {number})" if number > len(groups) else ""
    axis.set_title(f"{title}{rest}: {change}")


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:25] + "..."


def length_figure(audit: Audit, spearman: float | None) -> Figure | None:
    """The number that decided against the number of target tokens; None if no number decided."""
    values, lengths = column(audit, "value"), column(audit, "n_target")
    seen = np.flatnonzero(np.isfinite(values) & (lengths > 0))
    if not len(seen):
        return None
    seen = seen[:: max(1, len(seen) // _MOST_DOTS)]
    stays = np.asarray(audit["decision"], dtype=object)[seen] != "drop"
    size = dot_size(len(seen))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axis = figure.subplots()
        for part, colour, label in ((~stays, GREY, "dropped"), (stays, BLUE, "stays")):
            axis.scatter(
                lengths[seen][part], values[seen][part], s=size, color=colour, alpha=0.6, linewidth=0, label=label
            )
        shown = values[seen]
        if shown.min() > 0 and shown.max() > 50 * np.median(shown):
            axis.set_yscale("log")
        axis.set_xlabel("target tokens of the row")
        axis.set_ylabel("number that decided")
        axis.set_title(_length_title(spearman))
        legend_below(figure, axis, markerscale=6 / size**0.5)
    return figure


def _length_title(spearman: float | None) -> str:
    if spearman is None:
        return "Score and length: no rank correlation can be computed"
    follows = "the score follows length" if abs(spearman) > _SUSPICIOUS else "the score does not follow length closely"
    return f"Spearman {spearman:+.2f}: {follows}"
