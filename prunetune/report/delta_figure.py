"""Perplexity over the share of the delta that is dropped; the title says what this model's share costs."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from prunetune.report.palette import BLUE, GREY, INK, ORANGE, STYLE

# Perplexities beyond this multiple of the best one only say that nothing is left; the axis then counts in powers.
_WIDE = 3.0


def delta_figure(delta: dict[str, Any]) -> Figure:
    """The curve of delta.json."""
    points = [(point["drop"], point["perplexity"]) for point in delta["curve"]]
    whole = delta["whole_perplexity"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axis = figure.subplots()
        places = range(len(points))
        axis.axhline(whole, color=GREY, linestyle="--", linewidth=1.2, zorder=0)
        axis.plot(places, [value for _, value in points], "o-", color=BLUE, linewidth=2, markersize=5)
        for place, (drop, value) in zip(places, points):
            if drop == delta["drop"]:
                axis.plot([place], [value], "o", color=ORANGE, markersize=11, fillstyle="none", markeredgewidth=2)
            axis.annotate(
                f"{value:.3g}", (place, value), xytext=(0, 8), textcoords="offset points", ha="center", color=INK
            )
        axis.set_xticks(list(places), [f"{drop:.4g}" for drop, _ in [(100 * drop, value) for drop, value in points]])
        if max(value for _, value in points) > _WIDE * min(value for _, value in points):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_locator(NullLocator())
            ticks = sorted({float(f"{value:.2g}") for _, value in points})
            axis.yaxis.set_major_locator(FixedLocator(ticks))
        axis.margins(y=0.2)
        axis.set_xlabel(f"% of the delta dropped ({delta['method']})")
        axis.set_ylabel("perplexity")
        axis.set_title(f"Keeping everything: {whole:.3g}; as exported: {delta['perplexity']:.3g}; lower is better")
        axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure
