"""Loss, kept fraction and time of a step over the steps, with the phases shaded; titles say what to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prunetune.report.gather import phase_spans, series
from prunetune.report.palette import BLUE, GREEN, INK, ORANGE, STYLE

PHASE_LOOK = {
    "warmup": ("#F0F0F0", "warm-up"),
    "search": ("#FCE8D5", "search"),
    "recover": ("#DDEEF8", "recover"),
}


def training_figure(metrics: tuple[dict[str, Any], ...]) -> Figure | None:
    """Loss, kept fraction and seconds per step over the steps, phases shaded; None without any of them."""
    drawings = [
        (name, draw)
        for name, draw in (
            ("loss", _draw_loss),
            ("kept_fraction", _draw_kept),
            ("step_seconds", _draw_seconds),
        )
        if series(metrics, name)[0]
    ]
    if not drawings:
        return None
    spans = phase_spans(metrics)
    heights = [2.0 if name == "loss" else 1.0 for name, _ in drawings]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.2 + 1.45 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(drawings), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axis, (_, draw) in zip(axes, drawings, strict=True):
            draw(axis, metrics)
            _shade(axis, spans)
            axis.grid(axis="y", color="#E5E5E5", linewidth=0.8)
            axis.set_axisbelow(True)
        _name_phases(axes[0], spans)
        axes[-1].set_xlabel("optimizer step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        last = max(float(entry["step"]) for entry in metrics)
        axes[-1].set_xlim(0, max(1.0, last))
    return figure


def _draw_loss(axis: Any, metrics: tuple[dict[str, Any], ...]) -> None:
    steps, losses = series(metrics, "loss")
    many = len(losses) >= 10
    axis.plot(steps, losses, color=BLUE, alpha=0.3 if many else 1, linewidth=1, label="training, each log")
    if not many:
        axis.plot(steps, losses, "o", color=BLUE, markersize=3)
    smooth = _smooth_by_leg(steps, losses, phase_spans(metrics)) if many else losses
    if many:
        axis.plot(steps, smooth, color=BLUE, linewidth=2, label="training, running mean")
    eval_steps, eval_losses = series(metrics, "eval_loss")
    if eval_steps:
        axis.plot(eval_steps, eval_losses, "D", color=ORANGE, clip_on=False, zorder=5, label="held-out rows")
    low, high = np.quantile([*losses, *eval_losses], [0.0, 0.99])
    axis.set_ylim(low - 0.08 * (high - low + 1e-9), high + 0.2 * (high - low + 1e-9))
    axis.set_ylabel("loss (nats per token)")
    axis.set_title(f"Training loss went from {smooth[0]:.2f} to {smooth[-1]:.2f}; lower is better")
    axis.legend(loc="upper right", frameon=True, framealpha=0.85, edgecolor="none")


def _draw_kept(axis: Any, metrics: tuple[dict[str, Any], ...]) -> None:
    steps, kept = series(metrics, "kept_fraction")
    axis.plot(steps, kept, color=ORANGE, linewidth=2, drawstyle="steps-post")
    axis.set_ylim(0, 1.08)
    axis.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axis.set_ylabel("kept")
    axis.set_title(f"Decoder parameters kept: {kept[0]:.0%} at first, {kept[-1]:.1%} in the end")


def _draw_seconds(axis: Any, metrics: tuple[dict[str, Any], ...]) -> None:
    steps, seconds = series(metrics, "step_seconds")
    axis.plot(steps, seconds, color=GREEN, linewidth=1.2)
    axis.set_ylim(0, 1.3 * float(np.quantile(seconds, 0.95)))
    axis.set_ylabel("seconds")
    medians = {
        phase: float(np.median(values))
        for phase in ("search", "recover")
        if (values := [e["step_seconds"] for e in metrics if e.get("phase") == phase and "step_seconds" in e])
    }
    said = ", ".join(f"{value:.2f} s in {PHASE_LOOK[phase][1]}" for phase, value in medians.items())
    axis.set_title("Time of a step" + (f": {said} (medians)" if said else ""))


def _shade(axis: Any, spans: Sequence[tuple[str, float, float]]) -> None:
    for phase, first, last in spans:
        if phase in PHASE_LOOK:
            axis.axvspan(first, last, color=PHASE_LOOK[phase][0], zorder=0, linewidth=0)
        if phase == "recover" and first > 0:
            axis.axvline(first, color=INK, linestyle="--", linewidth=1)


def _name_phases(axis: Any, spans: Sequence[tuple[str, float, float]]) -> None:
    total = max((last for _, _, last in spans), default=0.0)
    for phase, first, last in spans:
        # A stretch too narrow for its name keeps its shade only.
        if phase in PHASE_LOOK and total and (last - first) / total > 0.08:
            axis.annotate(
                PHASE_LOOK[phase][1],
                ((first + last) / 2, 0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                color=INK,
            )
        if phase == "recover" and first > 0:
            axis.annotate(
                "plan frozen,\nmodel cut",
                (first, 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                va="top",
                fontsize=8.5,
                color=INK,
            )


def _smooth_by_leg(
    steps: Sequence[float], values: Sequence[float], spans: Sequence[tuple[str, float, float]]
) -> list[float]:
    """Running mean that does not reach over the freeze: the model is another one afterwards."""
    freeze = next((first for phase, first, _ in spans if phase == "recover"), -1.0)
    before = sum(step <= freeze for step in steps)
    width = max(3, len(values) // 20)
    return _running_mean(values[:before], width) + _running_mean(values[before:], width)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over ``width`` values around each, fewer at the ends."""
    half = width // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]
