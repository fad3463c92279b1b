"""Domain perplexity of every recipe, one panel a budget, references as lines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from prunetune.report.palette import BLUE, GREEN, GREY, INK, ORANGE, STYLE
from prunetune.report.recipe_results import Summary


def comparison_figure(found: Sequence[Summary]) -> bytes:
    """The figure as a PNG: left is better, joint methods blue, one-shot ones orange, random controls grey."""
    budgets = sorted({s.kept for s in found if s.kept is not None}, reverse=True)
    panels = [[s for s in found if s.kept == kept] for kept in budgets] or [[]]
    references = [s for s in found if s.kept is None]
    most = max(1, *(len(panel) for panel in panels))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.5, len(panels) * (0.9 + 0.28 * most)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        for axis, kept, panel in zip(axes, budgets or [1.0], panels, strict=True):
            _draw(axis, sorted(panel, key=lambda s: -s.means["domain_ppl"]), references)
            axis.set_title(f"{kept:.0%} of the decoder kept")
        axes[0].legend(loc="lower right", fontsize=8, frameon=False)
        axes[-1].set_xlabel("perplexity of held-out rows (lower is better)")
        image = io.BytesIO()
        FigureCanvasAgg(figure).print_png(image)
    return image.getvalue()


def _draw(axis: Any, panel: Sequence[Summary], references: Sequence[Summary]) -> None:
    for place, summary in enumerate(panel):
        value, colour = summary.means["domain_ppl"], _colour(summary.label)
        spread = summary.spreads.get("domain_ppl", 0.0)
        axis.plot([value / (1 + spread), value * (1 + spread)], [place, place], color=colour, linewidth=2)
        axis.plot(value, place, "o", color=colour, markersize=6)
        axis.annotate(
            f"{value:.3g}" if value < 1000 else f"{value:.0f}",
            (value, place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    for summary, dashes in zip(references, ("-", "--", ":"), strict=False):
        axis.axvline(summary.means["domain_ppl"], color=INK, linewidth=1, linestyle=dashes, label=summary.label)
    axis.set_yticks(range(len(panel)), [summary.label for summary in panel], fontsize=8)
    axis.set_ylim(-0.7, max(0, len(panel) - 1) + 0.7)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.12)


def _colour(label: str) -> str:
    if "random" in label:
        return GREY
    return BLUE if label.startswith("joint") else ORANGE if label.startswith("one-shot") else GREEN
