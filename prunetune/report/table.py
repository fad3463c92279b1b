"""The before/after table, for the terminal (80 columns) and as Markdown; it measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.table import Table

from prunetune.core.records import EvalResult
from prunetune.core.sizes import format_bytes, format_count

MISSING = "–"


@dataclass(frozen=True)
class Line:
    """One row of the table: what it is called, its number's name, how it is shown."""

    title: str
    number: str
    show: Callable[[float], str]
    group: str
    ratio: str = ""


def _decimal(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


LINES = (
    Line("Domain perplexity ↓", "domain_ppl", _decimal, "quality"),
    Line("General perplexity ↓", "general_ppl", _decimal, "quality"),
    Line("Exact answers ↑", "exact_match", _percent, "quality"),
    Line("Parameters ↓", "params_total", format_count, "size"),
    Line("  in the decoder ↓", "params_decoder", format_count, "size"),
    Line("Weights on disk ↓", "weight_bytes", format_bytes, "size"),
    Line("Weights as bf16 ↓", "weight_bytes_bf16", format_bytes, "size"),
    Line("Peak memory ↓", "peak_memory_bytes", format_bytes, "size"),
    Line("Prefill tok/s, batch 1 ↑", "prefill_tps_b1", _rate, "speed", "prefill_speedup_b1"),
    Line("Prefill tok/s, batch 8 ↑", "prefill_tps_b8", _rate, "speed", "prefill_speedup_b8"),
    Line("Decode tok/s, batch 1 ↑", "decode_tps_b1", _rate, "speed", "decode_speedup_b1"),
    Line("Decode tok/s, batch 8 ↑", "decode_tps_b8", _rate, "speed", "decode_speedup_b8"),
)


@dataclass(frozen=True)
class Cells:
    """A line's text: its title, a value for each model, and how the last compares with the first."""

    title: str
    values: tuple[str, ...]
    change: str
    ends_group: bool


def table_cells(results: Sequence[EvalResult]) -> list[Cells]:
    """The rows of the table; a number that no model has is left out."""
    lines = [line for line in LINES if any(line.number in result.numbers for result in results)]
    rows = []
    for line, following in zip_longest(lines, lines[1:]):
        values = tuple(
            line.show(result.numbers[line.number]) if line.number in result.numbers else MISSING for result in results
        )
        ends_group = following is not None and following.group != line.group
        rows.append(Cells(line.title, values, _change(line, results), ends_group))
    return rows


def change_title(results: Sequence[EvalResult]) -> str:
    """Heading of the last column."""
    return f"{results[-1].label} vs {results[0].label}"


def before_after_table(results: Sequence[EvalResult], title: str = "Before and after") -> Table:
    """A table with one column a model, readable at 80 columns for up to three models."""
    # Without the outer frame, three models and the change fit into 80 columns.
    table = Table(
        title=title,
        caption="↓ lower is better, ↑ higher is better",
        title_justify="left",
        caption_justify="left",
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for result in results:
        table.add_column(result.label, justify="right", overflow="fold")
    if len(results) > 1:
        table.add_column(change_title(results), justify="right", style="bold", overflow="fold")
    for cells in table_cells(results):
        change = [cells.change] if len(results) > 1 else []
        table.add_row(cells.title, *cells.values, *change, end_section=cells.ends_group)
    return table


def before_after_markdown(results: Sequence[EvalResult]) -> str:
    """The same table in Markdown."""
    several = len(results) > 1
    head = ["", *(result.label for result in results), *([change_title(results)] if several else [])]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for cells in table_cells(results):
        rows.append([cells.title.strip(), *cells.values, *([cells.change] if several else [])])
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows) + "\n"


def _change(line: Line, results: Sequence[EvalResult]) -> str:
    first, last = results[0].numbers, results[-1].numbers
    if line.ratio in last:
        # The median of the turns' ratios, not the ratio of the medians: the machine's drift is out of it.
        spread = f" ({last[line.ratio + '_low']:.2f}–{last[line.ratio + '_high']:.2f})"
        return f"{last[line.ratio]:.2f}x{spread}"
    if line.number not in first or line.number not in last or not first[line.number]:
        return MISSING
    percent = 100 * (last[line.number] / first[line.number] - 1)
    return f"{percent:+.1f}%" if abs(percent) < 1000 else f"x{percent / 100 + 1:.0f}"
