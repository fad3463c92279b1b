"""From scores to a selection's folder with its report; and the report again, from the folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.core.errors import DataError
from prunetune.core.files import write_text
from prunetune.core.streams import stream
from prunetune.data.audit import WrittenSelection, read_selection
from prunetune.data.selection import Selection, select
from prunetune.data.selection_folder import write_selection
from prunetune.report.selection import SelectionRecord, ShownExample, selection_html

REPORT = "report.html"
_SHOWN = 20


def select_run(scores: Path, out: Path, *, replace: bool = False, **settings: Any) -> Selection:
    """Selects from scores on disk and writes the selection with its audit and report.

    Args:
        scores: a folder of scores.
        out: where to.
        replace: overwrite a selection there.
        settings: see ``prunetune.data.selection.select``.

    Raises:
        ConfigError, DataError: see ``select`` and ``write_selection``.
    """
    import datasets

    datasets.disable_progress_bars()
    out = Path(out)
    if out.exists() and not replace:
        raise DataError(f"{out} exists; name another folder with --out, or add --overwrite")
    selection = select(scores, **settings)
    write_selection(selection, out, replace=replace, finish=lambda folder: write_report(read_selection(folder)))
    return selection


def report_run(folder: Path) -> Path:
    """Writes report.html of a selection anew; returns its path."""
    return write_report(read_selection(folder))


def write_report(written: WrittenSelection) -> Path:
    """Writes report.html into a selection's folder; returns its path."""
    audit = {name: written.audit[name].to_pylist() for name in written.audit.column_names}
    record = SelectionRecord(written.facts, audit, _examples(written, audit))
    path = written.folder / REPORT
    write_text(path, selection_html(record))
    return path


def _examples(written: WrittenSelection, audit: dict[str, list[Any]]) -> list[ShownExample]:
    """Rows by lot, as many kept as dropped ones; none if the tokenizer is not at hand."""
    draw = stream(int(written.facts["settings"]["seed"]), "report examples")
    rows: list[int] = []
    for stays in (True, False):
        side = [row for row, decision in enumerate(audit["decision"]) if (decision != "drop") == stays]
        rows += sorted(int(row) for row in draw.permutation(side)[:_SHOWN])
    try:
        return [
            ShownExample(audit["id"][row], audit["decision"][row], audit["sentence"][row], written.segments(row))
            for row in rows
        ]
    except DataError:
        return []
