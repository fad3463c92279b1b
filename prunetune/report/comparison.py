"""What `prunetune compare` shows: one table for the terminal, Markdown, and a page with the figure."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from prunetune.core.files import new_file, write_json, write_text
from prunetune.core.sizes import format_bytes, format_fraction
from prunetune.report.comparison_figure import comparison_figure
from prunetune.report.recipe_results import DOMAIN, KEPT, Summary, show_ppl, summaries
from prunetune.report.templating import render

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One number of a budget's table."""

    title: str
    number: str
    show: Callable[[float], str]


COLUMNS = (
    Column("domain ppl ↓", DOMAIN, show_ppl),
    Column("general ppl ↓", "general_ppl", show_ppl),
    Column("exact answers ↑", "exact_match", lambda value: f"{value:.1%}"),
    Column("kept of decoder", KEPT, lambda value: f"{value:.1%}"),
    Column("seconds", "seconds", lambda value: f"{value:.0f}"),
    Column("peak memory", "peak_bytes", format_bytes),
)


def comparison_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Domain / general perplexity of every recipe, one column a budget; see ``summaries``."""
    found = summaries(results)
    budgets = _budgets(found)
    table = Table(
        title="Domain / general perplexity",
        caption="; ".join(["lower is better", *(words for mark, words in _MARKS.items() if mark in map(_mark, found))]),
        title_justify="left",
        caption_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("recipe", overflow="fold")
    for kept in budgets:
        table.add_column(f"{format_fraction(kept)} kept", justify="right", no_wrap=True)
    by_key = {(summary.label, summary.kept): summary for summary in found}
    for label in dict.fromkeys(summary.label for summary in found):
        # A reference stands in every budget's column.
        cells = [by_key.get((label, kept)) or by_key.get((label, None)) for kept in budgets]
        table.add_row(label, *(_pair(summary) for summary in cells))
    return table


def _budgets(found: Sequence[Summary]) -> list[float]:
    return sorted({summary.kept for summary in found if summary.kept is not None}, reverse=True) or [1.0]


_MARKS = {
    "! ": "! no better than units chosen at random",
    "(!) ": "(!) no better than units chosen at random, of which more or fewer were kept",
}


def _mark(summary: Summary) -> str:
    if summary.beats_random is not False:
        return ""
    return "! " if summary.random_kept is None else "(!) "


def _pair(summary: Summary | None) -> str:
    if summary is None or not summary.means:
        return MISSING
    numbers = [show_ppl(summary.means[name]) for name in (DOMAIN, "general_ppl") if name in summary.means]
    part = f" ({summary.seeds} of {summary.planned} seeds)" if summary.seeds < summary.planned else ""
    return _mark(summary) + " / ".join(numbers) + part


def write_comparison(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes results.json, table.md, comparison.png and report.html into ``folder``; nothing without a result.

    Args:
        results: see ``summaries``; those of runs without a result stand in the tables, too.
    """
    there = [result for result in results if DOMAIN in result]
    if not there:
        return
    write_json(folder / "results.json", there)
    found = summaries(results)
    tables = [_budget_table(found, kept) for kept in _budgets(found)]
    write_text(folder / "table.md", "\n".join(_markdown(table) for table in tables))
    image = comparison_figure(found)
    with new_file(folder / "comparison.png") as file:
        file.write_bytes(image)
    page = render(
        "comparison.html.jinja",
        tables=tables,
        figure=base64.b64encode(image).decode("ascii"),
        summary=_summary(there, len(results)),
        unbeaten=sorted(f"{s.label} at {format_fraction(s.kept)}{_beside(s)}" for s in found if _mark(s) and s.kept),
    )
    write_text(folder / "report.html", page)


def _summary(there: Sequence[Mapping[str, Any]], planned: int) -> str:
    """The sentence below the page's title."""
    runs = "1 run" if planned == 1 else f"{planned} runs"
    words = f"{runs} on the same data, budgets and seeds"
    if steps := sorted({int(result["steps"]) for result in there if result["steps"]}):
        words += f", {' or '.join(map(str, steps))} optimizer steps each"
    if missing := planned - len(there):
        words += f"; {missing} without a result (failed, or still to be done)"
    return words + "."


def _budget_table(found: Sequence[Summary], kept: float) -> dict[str, Any]:
    """Heading, columns and rows of one budget, the best domain perplexity first, what has no result last."""
    part = sorted((s for s in found if s.kept in (kept, None)), key=lambda s: (not s.means, s.domain_ppl))
    columns = [column for column in COLUMNS if any(column.number in summary.means for summary in part)]
    rows = [{"label": _name(s), "cells": [_cell(s, column) for column in columns]} for s in part]
    return {"title": f"{format_fraction(kept)} kept", "columns": [column.title for column in columns], "rows": rows}


def _name(summary: Summary) -> str:
    """The label, and what to know before its numbers are read."""
    remarks = []
    if not summary.seeds:
        remarks.append("no result: failed, or still to be done")
    elif summary.seeds < summary.planned:
        remarks.append(f"{summary.seeds} of {summary.planned} seeds")
    if summary.diverged and summary.seeds > 1:
        remarks.append(f"{summary.diverged} of {summary.seeds} diverged")
    if _mark(summary):
        remarks.append(f"no better than random{_beside(summary)}")
    return summary.label + (f" ({'; '.join(remarks)})" if remarks else "")


def _beside(summary: Summary) -> str:
    """What the random control kept, where that is another size."""
    other = summary.random_kept
    return "" if other is None else f", which kept {format_fraction(other)} of the decoder"


def _cell(summary: Summary, column: Column) -> str:
    if column.number not in summary.means:
        return MISSING
    value = summary.means[column.number]
    spread = summary.spreads.get(column.number) if math.isfinite(value) else None
    return column.show(value) + ("" if spread is None else f" ± {spread:.1%}")


def _markdown(table: Mapping[str, Any]) -> str:
    lines = [f"## {table['title']}", "", "| recipe | " + " | ".join(table["columns"]) + " |"]
    lines.append("|---|" + "---:|" * len(table["columns"]))
    lines += [f"| {row['label']} | " + " | ".join(row["cells"]) + " |" for row in table["rows"]]
    return "\n".join(lines) + "\n"
