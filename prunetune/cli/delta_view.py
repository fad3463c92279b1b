"""What `prunetune delta info` shows: one line a kind of matrix, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from prunetune.core.console import console, note

# Below it random dropping is known to work; above the larger one it is known to fail (DARE's and DAREx's tables).
_SMALL, _LARGE = 1e-3, 5e-3


def show_info(records: Sequence[dict[str, Any]], each: bool = False) -> None:
    """Prints every matrix, or medians over layers for every kind, and advice. R: see ``model.deltas.alignment``."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        name = record["name"].removesuffix(".weight")
        name = name.removeprefix("model.").removeprefix("layers.") if each else name.rpartition(".")[2]
        groups.setdefault((record["model"], name), []).append(record)
    several = len({model for model, _ in groups}) > 1
    rates = list(next((record["errors"] for record in records if "errors" in record), {}))
    title = "Changes" if each else "Changes, medians over layers"
    title += "; error of the output if so much is dropped by lot" if rates else ""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in [*(["model"] if several else []), "matrix"]:
        table.add_column(name, no_wrap=not each, overflow="fold")
    counts = [] if each else ["count"]
    for name in [*counts, "mean |D|", "|D|/|W|", *(["R", *rates] if rates else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for (model, name), group in groups.items():
        cells = [*([model] if several else []), name, *([] if each else [str(len(group))])]
        cells += [f"{_mid(group, 'mean_abs'):.1e}", f"{_mid(group, 'relative'):.1%}"]
        measured = [record for record in group if "R" in record]
        if measured:
            cells.append(f"{_mid(measured, 'R'):.3f}")
            cells += [f"{median(record['errors'][rate] for record in measured):.2f}" for rate in rates]
        table.add_row(*cells)
    console().print(table)
    _advise(records, bool(rates))


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
