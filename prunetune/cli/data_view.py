"""What the `prunetune data` commands print: inspections, scores, selections, explanations, differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prunetune.core.console import console, note, warn
from prunetune.core.sizes import format_count, format_fraction

if TYPE_CHECKING:
    from prunetune.data.audit import Difference, Explanation
    from prunetune.data.inspection import Inspection
    from prunetune.data.store import StoredScores

STYLES = {
    "context": "dim",
    "trained": "bold green",
    "kept": "bold green",
    "dropped": "strike red",
    "cut": "strike dim",
}
# Where there are no styles: in a file, in a pipe.
BRACKETS = {"trained": ("[[", "]]"), "kept": ("[[", "]]"), "dropped": ("~~", "~~"), "cut": ("~~", "~~")}
_MOST_CHARACTERS = 1500
_MOST_BAD = 10


def show_inspection(found: Inspection) -> None:
    """Prints an inspection: facts, bad rows, some rows with what is trained highlighted, warnings."""
    facts = found.facts
    lengths = facts["length_tokens"]
    usable = found.rows - len(found.bad)
    table = _facts(f"{found.name}: {found.rows} rows")
    table.add_row("layout", escape(found.layout))
    table.add_row("chat template", "used" if found.chat else "none; rows are plain text")
    table.add_row("trained", f"{format_fraction(facts['target_share'])} of {format_count(facts['tokens'])} tokens")
    table.add_row("lengths", ", ".join(f"{name} {value}" for name, value in lengths.items()) + " tokens")
    if found.max_length is not None:
        table.add_row("cut", f"{found.truncated} of {usable} rows are longer than {found.max_length} tokens")
    table.add_row("end of turn", f"trained in {format_fraction(found.stops)} of the rows, before any cut")
    back = "the text of every row" if not found.altered else f"not the text of {len(found.altered)} rows"
    table.add_row("round trip", f"tokens decode to {back}")
    near = "not looked for" if found.near is None else f"{len(found.near)} nearly"
    table.add_row("repeats", f"{len(found.exact)} exactly, {near}")
    console().print(table)
    _places("rows that cannot be used", found.unit, found.bad)
    _places("rows that do not come back from their tokens", found.unit, found.altered)
    repeats = {**found.exact, **(found.near or {})}
    _places("rows that repeat others", found.unit, {place: f"like {found.unit} {repeats[place]}" for place in repeats})
    if found.shown:
        key = [("Some rows: context", "context"), ("what the loss sees", "trained"), ("what is cut off", "cut")]
        console().print(_key(key))
    for shown in found.shown:
        console().print(f"\n[bold]{found.unit} {shown.place}[/bold]")
        console().print(marked(shown.segments), soft_wrap=True)
    for text in found.warnings:
        warn(escape(text))


def _places(title: str, unit: str, faults: Mapping[int, str]) -> None:
    if not faults:
        return
    console().print(f"[bold]{title}[/bold]")
    for place in sorted(faults)[:_MOST_BAD]:
        console().print(f"  {unit} {place}: {escape(faults[place])}", soft_wrap=True)
    if len(faults) > _MOST_BAD:
        console().print(f"  and {len(faults) - _MOST_BAD} more")


def marked(segments: Iterable[tuple[str, str]]) -> Text:
    """Pieces of text, each in the style of its state (in brackets if it is not shown), cut to what can be read."""
    text, room = Text(), _MOST_CHARACTERS
    plain = not console().is_terminal
    for piece, state in segments:
        if room > 0:
            before, after = BRACKETS.get(state, ("", "")) if plain else ("", "")
            text.append(f"{before}{piece[:room]}{after}", style=STYLES[state])
        room -= len(piece)
    if room < 0:
        text.append(f" ... {-room} more characters", style="dim italic")
    return text


def _key(names: Iterable[tuple[str, str]]) -> Text:
    return Text(", ").join(marked([entry]) for entry in names)


def show_scores(scores: StoredScores, out: Path) -> None:
    """Prints what a scoring pass found, and the next command."""
    table = scores.table
    facts = _facts(f"{len(table)} rows scored")
    facts.add_row("target tokens", f"{int(table.offsets[-1]):,}")
    if scores.header.get("seconds"):
        speed = scores.header["scored_tokens"] / max(scores.header["seconds"], 1e-9)
        facts.add_row("time", f"{scores.header['seconds']:,.1f} s, {format_count(speed)} tokens a second")
    facts.add_row("row statistics", ", ".join(sorted(table.rows)))
    facts.add_row("token statistics", ", ".join(sorted(table.tokens)))
    console().print(facts)
    note(escape(f"next: prunetune data select {out} --method q_tuning --samples 25% --tokens 70% --out kept"))


def show_selection(facts: Mapping[str, Any], out: Path) -> None:
    """Prints what was asked for and reached, warnings, and what to do with it."""
    counts, asked, reached = facts["counts"], facts["requested"], facts["achieved"]
    table = Table(title="What stays", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "all", "stays", "reached", "asked for"):
        table.add_column(name, justify="right" if name else "left")
    for title, whole, stays, name in (
        ("samples", "rows", "kept_rows", "samples"),
        ("their targets", "target_tokens_of_kept_rows", "kept_target_tokens", "tokens_of_kept_rows"),
        ("all targets", "target_tokens", "kept_target_tokens", "target_tokens"),
        ("tokens read", "forward_tokens", "kept_forward_tokens", "forward_tokens"),
    ):
        wanted = format_fraction(asked[name]) if name in asked else ""
        table.add_row(title, f"{counts[whole]:,}", f"{counts[stays]:,}", format_fraction(reached[name]), wanted)
    console().print(table)
    note("reasons: " + ", ".join(f"{escape(name)} {count}" for name, count in facts["reasons"].items()))
    for text in facts["warnings"]:
        warn(escape(text))
    note(escape(f"written: {out} (report.html, audit.parquet, dataset)"))
    note(escape(f"next: prunetune train run.yaml data.train={out}, or datasets.load_from_disk('{out}/dataset')"))


def show_explanation(found: Explanation) -> None:
    """Prints why a row was kept or dropped, and its text."""
    console().print(f"[bold]{found.id}[/bold]")
    for sentence in found.sentences:
        console().print(escape(sentence), soft_wrap=True)
    console().print()
    console().print(marked(found.segments), soft_wrap=True)
    console().print(_key([("context", "context"), ("what the loss sees", "kept"), ("dropped", "dropped")]))


def show_difference(found: Difference, first: str, second: str, most: int) -> None:
    """Prints how far two selections agree, and some rows on which they do not."""
    table = Table(title="Rows by decision", title_justify="left", box=box.SIMPLE_HEAD)
    for name in (first, second):
        table.add_column(escape(name))
    table.add_column("rows", justify="right")
    for (one, other), count in found.counts.items():
        table.add_row(one, other, f"{count:,}")
    console().print(table)
    note(f"overlap of what stays (both / either): {found.rows:.3f} of rows, {found.tokens:.3f} of target tokens")
    note(f"{len(found.changed):,} rows were decided differently, or keep other tokens")
    for entry in found.changed[:most]:
        one, other = entry["reasons"]
        console().print(escape(f"  {entry['id']}  {entry['first']} ({one}) -> {entry['second']} ({other})"))
    if len(found.changed) > most:
        console().print(f"  and {len(found.changed) - most:,} more; --rows shows more of them")


def _facts(title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table
