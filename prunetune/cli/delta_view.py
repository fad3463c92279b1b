"""What `prunetune delta info` shows: one line a kind of matrix, and what follows from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from prunetune.core.console import console, note

_LAYER = re.compile(r"\.\d+\.")
# Below it random dropping is known to work; above the larger one it is known to fail (DARE's and DAREx's tables).
_SMALL, _LARGE = 1e-3, 5e-3


def show_info(records: Sequence[dict[str, Any]]) -> None:
    """Prints medians over layers for every kind of matrix, and advice."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["model"], _LAYER.sub(".*.", record["name"])), []).append(record)
    calibrated = any("R" in record for record in records)
    table = Table(title="Changes, medians over layers", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("model", "matrix", "how many", "mean |D|", "|D| / |W|"):
        table.add_column(column, justify="left" if column in ("model", "matrix") else "right")
    rates = list(next((record["errors"] for record in records if "errors" in record), {}))
    for column in ("R", *(f"error at {rate}" for rate in rates)) if calibrated else ():
        table.add_column(column, justify="right")
    for (model, name), group in groups.items():
        cells = [model, name, str(len(group)), f"{_mid(group, 'mean_abs'):.1e}", f"{_mid(group, 'relative'):.1%}"]
        measured = [record for record in group if "R" in record]
        if measured:
            cells.append(f"{_mid(measured, 'R'):.3f}")
            cells += [f"{median(record['errors'][rate] for record in measured):.2f}" for rate in rates]
        table.add_row(*cells)
    console().print(table)
    _advise(records, calibrated)


def _advise(records: Sequence[dict[str, Any]], calibrated: bool) -> None:
    mean = median(record["mean_abs"] for record in records)
    if mean > _LARGE:
        note(
            f"changes of {mean:.1e} are large: keep the largest instead of dropping by lot (--delta magnitude or wanda)"
        )
    elif mean > _SMALL:
        note(f"changes of {mean:.1e} are not small: take --delta darex_q with --calibration, and check the result")
    else:
        note(f"changes of {mean:.1e} are small: random dropping (dare, darex_q) is made for them")
    if calibrated:
        found = median(record["suggested_drop"] for record in records if "suggested_drop" in record)
        note(f"up to about {found:.0%} dropped, a typical matrix's output error stays below its change (dare)")
    else:
        note("name a file of rows with --calibration to see how much can be dropped")


def _mid(group: Sequence[dict[str, Any]], key: str) -> float:
    return float(median(record[key] for record in group))
