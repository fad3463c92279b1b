"""All figures of a run as PNG files; what each shows is in its own module."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from prunetune.report.delta_figure import delta_figure
from prunetune.report.gather import RunRecord
from prunetune.report.training_figure import training_figure
from prunetune.report.units_figure import kept_units_figure, scores_figure


def write_figures(record: RunRecord, folder: Path) -> list[Path]:
    """Draws the figures that the run has data for into ``folder``; returns their files in reading order."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in (
        ("training.png", training_figure(record.metrics)),
        ("kept_units.png", None if record.plan is None else kept_units_figure(record.plan, record.scores)),
        ("scores.png", scores_figure(record.scores, record.plan)),
        ("delta.png", delta_figure(record.delta) if record.delta else None),
    ):
        if figure is not None:
            FigureCanvasAgg(figure).print_png(folder / name)
            written.append(folder / name)
    return written
