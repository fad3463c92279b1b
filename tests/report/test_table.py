"""The before/after table: what it says, and that it fits a terminal of 80 columns."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from prunetune.report.table import MISSING, before_after_markdown, before_after_table, table_cells


def by_title(results):
    return {cells.title.strip(): cells for cells in table_cells(results)}


def test_values_and_changes(results):
    cells = by_title(results)
    assert cells["Domain perplexity ↓"].values == ("11.50", "5.75", "9.16")
    assert cells["Domain perplexity ↓"].change == "-20.3%"
    assert cells["Parameters ↓"].values[2] == "91.9M"
    assert cells["in the decoder ↓"].change == "-40.2%"
    # The median of per-turn ratios with its quartiles, as measured; not a ratio of the columns.
    assert cells["Prefill tok/s, batch 1 ↑"].change == "1.42x (1.37–1.47)"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fits_80_columns_and_folds_nothing(results, count):
    chosen = results[:count]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(before_after_table(chosen))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    # One line a number: no cell is folded into a second line.
    assert len([line for line in lines if "│" in line]) == len(table_cells(chosen))


def test_missing_numbers_are_dashes_and_unknown_lines_left_out(results):
    base = replace(results[0], numbers={"domain_ppl": 11.5, "general_ppl": 39.0})
    compact = replace(results[2], numbers={"domain_ppl": 9.16})
    cells = by_title([base, compact])
    assert list(cells) == ["Domain perplexity ↓", "General perplexity ↓"]
    assert cells["General perplexity ↓"].values == ("39.00", MISSING)
    assert cells["General perplexity ↓"].change == MISSING


def test_markdown_is_a_table(results):
    lines = before_after_markdown(results).splitlines()
    assert lines[0] == "|  | base | dense LoRA | compact | compact vs base |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert "| Domain perplexity ↓ | 11.50 | 5.75 | 9.16 | -20.3% |" in lines
    assert {line.count("|") for line in lines} == {6}


def test_one_model_has_no_change_column(results):
    assert before_after_markdown(results[:1]).splitlines()[0] == "|  | base |"
