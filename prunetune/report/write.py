"""All reports of a run folder in one call: figures, model card, report.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunetune.core.files import write_text
from prunetune.report.card import model_card
from prunetune.report.figures import write_figures
from prunetune.report.gather import gather
from prunetune.report.html import report_html
from prunetune.report.story import export_folder


def write_reports(run_folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Writes ``figures/*.png``, ``README.md`` and ``report.html`` from what the run folder holds.

    The card is also written into the exported model's folder, if that exists. Files that are missing (no
    evaluation, nothing pruned, a short run) leave out their part; nothing else changes.

    Args:
        run_folder: see ``gather`` for the files that are read.
        facts: what the folder does not say; every key may be missing.
            base_model: hub id or name. base_licence, data_licence: as their owners call them.
            data: one line on the training data. budget: what was asked for, for a person.
            mask, compensation, ranks, samples: names of the methods. papers: texts with arXiv numbers, links, or
            mappings with title and url. steps: optimizer steps. seconds: training time.
            conversational: the rows were chat messages. verification: check -> outcome of the export.
            warnings: texts. export: the exported folder (default: ``compact`` in the run folder).

    Raises:
        PlanMismatchError: plan.json is not a plan.
    """
    record = gather(run_folder, facts)
    figures = write_figures(record, record.folder / "figures")
    card = model_card(record)
    write_text(record.folder / "README.md", card)
    if export_folder(record).is_dir():
        write_text(export_folder(record) / "README.md", card)
    write_text(record.folder / "report.html", report_html(record, figures))
