"""Which rows stay, drawn over their statistics: the plane of error and uncertainty, and histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from prunetune.report.palette import BLUE, GREY, ORANGE, STYLE

Audit = Mapping[str, Sequence[Any]]
LOOK = {"drop": (GREY, "dropped"), "keep": (BLUE, "stays whole"), "mask": (ORANGE, "stays, some tokens dropped")}
HISTOGRAMS = {
    "value": "what decided",
    "ppl": "perplexity",
    "entropy": "mean entropy (nats)",
    "n_target": "target tokens",
}
_MOST_DOTS = 8000


def plane_figure(audit: Audit) -> Figure | None:
    """Perplexity against entropy, one dot a row, coloured by decision; None without these columns."""
    if "ppl" not in audit or "entropy" not in audit:
        return None
    ppl, entropy, decision = column(audit, "ppl"), column(audit, "entropy"), np.asarray(audit["decision"], dtype=object)
    seen = np.isfinite(ppl) & np.isfinite(entropy)
    if not seen.any():
        return None
    # Rows are in the order of their hashes: every n-th is a fair sample of a large set.
    shown = np.flatnonzero(seen)[:: max(1, int(seen.sum()) // _MOST_DOTS)]
    size = dot_size(len(shown))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5.4), layout="constrained")
        axis = figure.subplots()
        for name, (colour, label) in LOOK.items():
            part = shown[decision[shown] == name]
            if len(part):
                alpha = 0.6 if name == "drop" else 0.8
                axis.scatter(
                    ppl[part], entropy[part], s=size, color=colour, alpha=alpha, linewidth=0,
                    label=f"{label} ({int((decision == name).sum()):,})",
                )  # fmt: skip
        axis.set_xscale("log")
        _plain_ticks(axis, ppl[shown])
        axis.set_xlabel("error: perplexity of the answer (log scale)")
        axis.set_ylabel("uncertainty: mean entropy (nats)")
        stays = int((decision != "drop").sum())
        axis.set_title(f"{stays:,} of {len(decision):,} rows stay")
        legend_below(figure, axis, markerscale=6 / size**0.5)
    return figure


def dot_size(number: int) -> float:
    """Area of a dot, in square points, so that many do not cover each other and few can be seen."""
    return float(np.clip(9000 / number, 6, 40))


def legend_below(figure: Figure, axis: Any, **changes: Any) -> None:
    """The axis' legend under the figure: inside, it could cover data."""
    options = {"loc": "outside lower center", "ncols": 3, "frameon": False, **changes}
    figure.legend(*axis.get_legend_handles_labels(), **options)


def _plain_ticks(axis: Any, values: np.ndarray[Any, Any]) -> None:
    """1, 10, 100 rather than powers; 1, 2, 5, 10 where the values span little."""
    if values.max() < 300 * values.min():
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def histogram_figure(audit: Audit) -> Figure | None:
    """What stays and what was dropped over each statistic; None if there is none."""
    stays = np.asarray(audit["decision"], dtype=object) != "drop"
    names = [name for name in HISTOGRAMS if name in audit and np.isfinite(column(audit, name)).any()]
    if not names:
        return None
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * columns, 0.6 + 2.5 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).reshape(-1)
        for axis, name in zip(axes, names):
            _histogram(axis, column(audit, name), stays, HISTOGRAMS[name])
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        legend_below(figure, axes[0])
    return figure


def _histogram(axis: Any, values: np.ndarray[Any, Any], stays: np.ndarray[Any, Any], title: str) -> None:
    finite = np.isfinite(values)
    values, stays = values[finite], stays[finite]
    bars = int(np.clip(2 * np.sqrt(len(values)), 8, 40))
    # One outlier would squeeze all others into the first bar.
    low, high = float(values.min()), float(values.max())
    wide = low > 0 and high > 50 * float(np.median(values))
    if wide:
        edges = np.geomspace(low, high * 1.0001, bars + 1)
        axis.set_xscale("log")
        _plain_ticks(axis, values)
    elif (values == np.rint(values)).all():
        # Bars of whole numbers, or some would cover more of them than others.
        step = max(1, int(np.ceil((high - low + 1) / bars)))
        edges = np.arange(low - 0.5, high + 0.5 + step, step)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bars + 1)
    axis.hist([values[stays], values[~stays]], bins=edges, stacked=True, color=[BLUE, GREY], label=["stays", "dropped"])
    if stays.any() and not stays.all():
        medians = float(np.median(values[stays])), float(np.median(values[~stays]))
        title = f"{title}\nmedian {medians[0]:.3g} of what stays, {medians[1]:.3g} of the rest"
    axis.set_title(title, fontsize=9.5)
    axis.set_ylabel("rows")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def column(audit: Audit, name: str) -> np.ndarray[Any, Any]:
    """A numeric column; what is missing is NaN."""
    return np.array([np.nan if value is None else float(value) for value in audit[name]], dtype=np.float64)
