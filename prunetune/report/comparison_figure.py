"""Domain perplexity of every recipe, one panel a budget, references as lines."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from prunetune.core.sizes import format_fraction
from prunetune.report.palette import BLUE, GREEN, GREY, INK, ORANGE, STYLE
from prunetune.report.recipe_results import DOMAIN, Summary, is_random, show_ppl

# References are told apart by these, in turn.
_LINES = tuple(itertools.product((INK, GREEN, GREY), ("-", "--", ":", "-.")))
_ROW_INCHES = 0.28


def comparison_figure(found: Sequence[Summary]) -> bytes:
    """The figure as a PNG: left is better, joint methods blue, one-shot ones orange, random controls grey."""
    with matplotlib.rc_context(STYLE):
        image = io.BytesIO()
        FigureCanvasAgg(draw(found)).print_png(image)
    return image.getvalue()


def draw(found: Sequence[Summary]) -> Figure:
    """The figure itself; what diverged or has no result is left out."""
    finite = [s for s in found if math.isfinite(s.domain_ppl)]
    budgets = sorted({s.kept for s in finite if s.kept is not None}, reverse=True)
    panels = [[s for s in finite if s.kept == kept] for kept in budgets] or [[]]
    references = [s for s in finite if s.kept is None]
    rows = [max(2, len(panel)) for panel in panels]
    height = 0.8 + sum(0.6 + _ROW_INCHES * count for count in rows)
    figure = Figure(figsize=(8.5, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=rows)[:, 0]
    _scale(axes[0], [end for s in finite for end in _ends(s)])
    for axis, panel in zip(axes, panels, strict=True):
        _panel(axis, sorted(panel, key=lambda s: -s.domain_ppl), references)
    for axis, kept in zip(axes, budgets, strict=False):
        axis.set_title(f"{format_fraction(kept)} of the decoder kept")
    axes[-1].set_xlabel("perplexity of held-out rows (lower is better)")
    if handles := _legend(finite, references):
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _panel(axis: Any, panel: Sequence[Summary], references: Sequence[Summary]) -> None:
    for place, summary in enumerate(panel):
        colour, ends = _colour(summary.label), _ends(summary)
        axis.plot(ends, [place, place], color=colour, linewidth=2)
        axis.plot(summary.domain_ppl, place, "o", color=colour, markersize=6, markerfacecolor=_fill(summary, colour))
        axis.annotate(
            show_ppl(summary.domain_ppl),
            (ends[1], place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    for summary, (colour, dashes) in zip(references, itertools.cycle(_LINES), strict=False):
        axis.axvline(summary.domain_ppl, color=colour, linewidth=1, linestyle=dashes)
    axis.set_yticks(range(len(panel)), [summary.label for summary in panel], fontsize=8)
    axis.set_ylim(-0.7, max(1, len(panel) - 1) + 0.7)
    axis.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axis.set_axisbelow(True)


def _ends(summary: Summary) -> tuple[float, float]:
    """One standard deviation of the logarithm to both sides."""
    factor = math.exp(summary.spreads.get(DOMAIN, 0.0))
    return summary.domain_ppl / factor, summary.domain_ppl * factor


def _scale(axis: Any, values: Sequence[float]) -> None:
    """A handful of labelled ticks, whether the values are a percent apart or many decades; room for the numbers."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    ratio = high / low
    margin = max(ratio, 1.1) ** 0.12
    # All panels share the axis.
    axis.set_xscale("log")
    axis.set_xlim(low / min(margin, 2), high * margin)
    locator: Locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    if ratio > 300:
        locator = LogLocator(numticks=8)
    elif ratio > 4:
        locator = LogLocator(subs=(1, 2, 5))
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())


def _legend(finite: Sequence[Summary], references: Sequence[Summary]) -> list[Line2D]:
    """What is in the figure and does not speak for itself."""
    handles = [
        Line2D([], [], color=colour, linewidth=1, linestyle=dashes, label=summary.label)
        for summary, (colour, dashes) in zip(references, itertools.cycle(_LINES), strict=False)
    ]
    if any(s.beats_random is False for s in finite):
        hollow = Line2D([], [], color=INK, marker="o", linestyle="", markerfacecolor="white")
        hollow.set_label("no better than random")
        handles.append(hollow)
    if any(DOMAIN in s.spreads for s in finite):
        handles.append(Line2D([], [], color=INK, linewidth=2, label="± standard deviation over the seeds"))
    return handles


def _fill(summary: Summary, colour: str) -> str:
    return "white" if summary.beats_random is False else colour


def _colour(label: str) -> str:
    if is_random(label):
        return GREY
    return BLUE if label.startswith("joint") else ORANGE if label.startswith("one-shot") else GREEN
