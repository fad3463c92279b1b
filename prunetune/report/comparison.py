"""What `prunetune compare` shows: one table for the terminal, Markdown, and a page with the figure."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from prunetune.core.files import write_json, write_text
from prunetune.core.sizes import format_bytes
from prunetune.report.comparison_figure import comparison_figure
from prunetune.report.recipe_results import Summary, summaries
from prunetune.report.templating import render

MISSING = "–"


def _ppl(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}" if value < 10_000 else f"{value:.0e}"


@dataclass(frozen=True)
class Column:
    """One number of a budget's table."""

    title: str
    number: str
    show: Callable[[float], str]


COLUMNS = (
    Column("domain ppl ↓", "domain_ppl", _ppl),
    Column("general ppl ↓", "general_ppl", _ppl),
    Column("exact answers ↑", "exact_match", lambda value: f"{value:.1%}"),
    Column("kept of decoder", "kept_decoder", lambda value: f"{value:.1%}"),
    Column("seconds", "seconds", lambda value: f"{value:.0f}"),
    Column("peak memory", "peak_bytes", format_bytes),
)


def comparison_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Domain / general perplexity of every recipe, one column a budget."""
    found = summaries(results)
    budgets = _budgets(found)
    table = Table(
        title="Domain / general perplexity",
        caption="lower is better; ! no better than units chosen at random" if _any_beaten(found) else "lower is better",
        title_justify="left",
        caption_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("recipe", overflow="fold")
    for kept in budgets:
        table.add_column(f"{kept:.0%} kept", justify="right", no_wrap=True)
    by_key = {(summary.label, summary.kept): summary for summary in found}
    for label in dict.fromkeys(summary.label for summary in found):
        # A reference stands in every budget's column.
        cells = [by_key.get((label, kept)) or by_key.get((label, None)) for kept in budgets]
        table.add_row(label, *(_pair(summary) for summary in cells))
    return table


def _budgets(found: Sequence[Summary]) -> list[float]:
    return sorted({summary.kept for summary in found if summary.kept is not None}, reverse=True) or [1.0]


def _any_beaten(found: Sequence[Summary]) -> bool:
    return any(summary.beats_random is False for summary in found)


def _pair(summary: Summary | None) -> str:
    if summary is None:
        return MISSING
    numbers = [_ppl(summary.means[name]) for name in ("domain_ppl", "general_ppl") if name in summary.means]
    return ("! " if summary.beats_random is False else "") + " / ".join(numbers)


def write_comparison(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes results.json, table.md, comparison.png and report.html into ``folder``; nothing without a result."""
    if not results:
        return
    write_json(folder / "results.json", list(results))
    found = summaries(results)
    tables = [_budget_table(found, kept) for kept in _budgets(found)]
    write_text(folder / "table.md", "\n".join(_markdown(table) for table in tables))
    image = comparison_figure(found)
    (folder / "comparison.png").write_bytes(image)
    steps = sorted({int(result["steps"]) for result in results if result["steps"]})
    page = render(
        "comparison.html.jinja",
        tables=tables,
        figure=base64.b64encode(image).decode("ascii"),
        steps=", ".join(map(str, steps)),
        runs=len(results),
        unbeaten=sorted({f"{s.label} at {s.kept:.0%}" for s in found if s.beats_random is False and s.kept}),
    )
    write_text(folder / "report.html", page)


def _budget_table(found: Sequence[Summary], kept: float) -> dict[str, Any]:
    """Heading, columns and rows of one budget, the best domain perplexity first."""
    part = sorted((s for s in found if s.kept in (kept, None)), key=lambda s: s.means["domain_ppl"])
    columns = [column for column in COLUMNS if any(column.number in summary.means for summary in part)]
    rows = [{"label": _name(s), "cells": [_cell(s, column) for column in columns]} for s in part]
    return {"title": f"{kept:.0%} kept", "columns": [column.title for column in columns], "rows": rows}


def _name(summary: Summary) -> str:
    return summary.label + (" (no better than random)" if summary.beats_random is False else "")


def _cell(summary: Summary, column: Column) -> str:
    if column.number not in summary.means:
        return MISSING
    text = column.show(summary.means[column.number])
    return f"{text} ± {summary.spreads[column.number]:.1%}" if column.number in summary.spreads else text


def _markdown(table: Mapping[str, Any]) -> str:
    lines = [f"## {table['title']}", "", "| recipe | " + " | ".join(table["columns"]) + " |"]
    lines.append("|---|" + "---:|" * len(table["columns"]))
    lines += [f"| {row['label']} | " + " | ".join(row["cells"]) + " |" for row in table["rows"]]
    return "\n".join(lines) + "\n"
