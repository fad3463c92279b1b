"""report.html: one self-contained file that opens from disk, figures embedded, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.report.gather import RunRecord
from prunetune.report.story import export_folder, story
from prunetune.report.table import change_title, table_cells
from prunetune.report.templating import render

CAPTIONS = {
    "training.png": "The loss over the run. In warm-up all gates are open; in search the gates of the least useful "
    "units close, so the kept fraction falls; at the dashed line the decision is frozen and the model is physically "
    "cut; in recover the small model goes on learning, with the steps of a small model.",
    "kept_units.png": "One row per layer of the base model, blue for what stays. A black dot far to the right of the "
    "blue bar means that the channels that stay carry most of what the scores measured.",
    "delta.png": "Perplexity on held-out rows when so much of what the adapters learnt is dropped before it is merged; "
    "the dashed line keeps everything. The circle is what this model was made with.",
    "scores.png": "The scores that ranked the units when the plan was frozen. Blue and grey overlap where layers "
    "differ: units compete within their layer, so that every layer keeps the same width.",
}


def report_html(record: RunRecord, figures: Sequence[Path]) -> str:
    """The page's text."""
    results = record.results
    return render(
        "report.html.jinja",
        **story(record, str(export_folder(record))),
        labels=[result.label for result in results],
        change_title=change_title(results) if len(results) > 1 else "",
        cells=[_cells(row) for row in table_cells(results)],
        figures=[_embedded(file) for file in figures],
    )


def _cells(row: Any) -> dict[str, Any]:
    # jinja's row.values would be the dict's method.
    return {
        "title": row.title,
        "values_": row.values,
        "change": row.change,
        "ends_group": row.ends_group,
    }


def _embedded(file: Path) -> dict[str, str]:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return {"name": file.stem.replace("_", " "), "data": data, "caption": CAPTIONS.get(file.name, "")}
