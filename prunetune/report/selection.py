"""report.html of a selection of samples and tokens: one file that opens from disk, figures embedded."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prunetune.core.sizes import format_count, format_fraction
from prunetune.report.selection_figures import histogram_figure, plane_figure
from prunetune.report.selection_shift import composition_figure, length_figure
from prunetune.report.templating import render

MOST_CHARACTERS = 2000

CAPTIONS = {
    "plane": "Every dot is a row. To the right the model is more often wrong (perplexity), further up it is less sure "
    "(mean entropy of its predictions). Bottom left it knows already; top right is usually noise.",
    "histograms": "What stays (blue) on top of what was dropped (grey), by the statistics of the rows.",
    "composition": "Shares of the rows before (grey) and after (blue) the selection. A group whose blue bar is much "
    "shorter lost more than its part.",
    "length": "The number that decided, against the number of target tokens. A clear slope means that the selection is "
    "in good part one by length.",
}


@dataclass(frozen=True)
class ShownExample:
    """A row to read.

    Args:
        id: of the row.
        decision: keep, mask or drop.
        sentence: why.
        segments: (text, state) pieces; state is context, kept or dropped.
    """

    id: str
    decision: str
    sentence: str
    segments: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class SelectionRecord:
    """What the report is made from.

    Args:
        facts: what selection.json says.
        audit: column -> one value a row; see the columns of audit.parquet.
        examples: rows to read, kept and dropped ones.
    """

    facts: Mapping[str, Any]
    audit: Mapping[str, Sequence[Any]]
    examples: Sequence[ShownExample]


def selection_html(record: SelectionRecord) -> str:
    """The page's text."""
    facts = record.facts
    figures = selection_figures(record)
    return render(
        "selection.html.jinja",
        title=f"Selection: {_method(facts)}",
        summary=_summary(facts),
        warnings=facts["warnings"],
        amounts=_amounts(facts),
        amounts_note=_amounts_note(facts),
        reasons=[
            (name, facts["meanings"][name], f"{count:,}", format_fraction(count / facts["counts"]["rows"]))
            for name, count in sorted(facts["reasons"].items(), key=lambda item: -item[1])
        ],
        cost=[(name, format_fraction(value)) for name, value in facts["cost"]["relative_flops"].items()],
        cost_note=_cost_note(facts),
        figures=[{"name": name, "data": _png(figure), "caption": CAPTIONS[name]} for name, figure in figures.items()],
        groups=[
            ("stay", [_shown(example) for example in record.examples if example.decision != "drop"]),
            ("were dropped", [_shown(example) for example in record.examples if example.decision == "drop"]),
        ],
        settings=_settings(facts),
    )


def selection_figures(record: SelectionRecord) -> dict[str, Figure]:
    """The figures that there is data for, by name, in reading order."""
    drawn = {
        "plane": plane_figure(record.audit),
        "histograms": histogram_figure(record.audit),
        "composition": composition_figure(record.facts["composition"]),
        "length": length_figure(record.audit, record.facts["score_length_spearman"]),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _method(facts: Mapping[str, Any]) -> str:
    settings = facts["settings"]
    samples, tokens = settings["samples_method"], settings["tokens_method"]
    parts = [f"{samples} of samples" if samples else "", f"{tokens} of tokens" if tokens else ""]
    return ", ".join(part for part in parts if part) or "everything"


def _summary(facts: Mapping[str, Any]) -> str:
    counts, reached = facts["counts"], facts["achieved"]
    said = (
        f"{counts['kept_rows']:,} of {counts['rows']:,} rows stay ({format_fraction(reached['samples'])}), with "
        f"{format_fraction(reached['target_tokens'])} of the target tokens; the model reads "
        f"{format_fraction(reached['forward_tokens'])} of the tokens."
    )
    if reached["tokens_of_kept_rows"] == 1:
        return said
    gone = format_fraction(1 - reached["tokens_of_kept_rows"])
    where = "leave the text" if facts["removes"] else "stay as context, without a loss"
    return f"{said} {gone} of the targets of these rows {where}."


def _amounts(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    counts, asked, reached = facts["counts"], facts["requested"], facts["achieved"]
    rows = (
        ("samples", "rows", "kept_rows", "samples"),
        ("target tokens of the rows that stay", "target_tokens_of_kept_rows", "kept_target_tokens",
         "tokens_of_kept_rows"),
        ("target tokens of all rows", "target_tokens", "kept_target_tokens", "target_tokens"),
        ("tokens that the model reads", "forward_tokens", "kept_forward_tokens", "forward_tokens"),
    )  # fmt: skip
    return [
        (
            title,
            f"{counts[whole]:,}",
            f"{counts[stays]:,}",
            format_fraction(reached[name]),
            format_fraction(asked[name]) if name in asked else "",
        )
        for title, whole, stays, name in rows
    ]


def _amounts_note(facts: Mapping[str, Any]) -> str:
    if facts["removes"]:
        return "Dropped tokens leave the text, so the model reads fewer of them."
    return "Dropping tokens changes what is learnt, not what is read: time is saved by dropping rows."


def _cost_note(facts: Mapping[str, Any]) -> str:
    cost, scored = facts["cost"], facts["scores"]["scored_tokens"]
    if cost["scoring_seconds"] is None:
        return "Scoring is counted as one forward pass over everything; how long it took is not known."
    tokens = f" over {format_count(scored)} tokens" if scored else ""
    return (
        f"Scoring took {cost['scoring_seconds']:,.1f} s{tokens} and serves every further selection. At that speed an "
        f"epoch of LoRA on what stays is about {cost['seconds_saved_per_lora_epoch']:,.1f} s shorter. Below 100% the "
        "selection pays for its scoring."
    )


def _settings(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    named = {**facts["settings"], **{f"scores: {name}": value for name, value in facts["scores"].items()}}
    named |= {"prunetune": facts["prunetune"]}
    return [(name.replace("_", " "), str(value)) for name, value in named.items() if value not in (None, {})]


def _shown(example: ShownExample) -> dict[str, Any]:
    """The example cut to a length that can be read."""
    segments, room = [], MOST_CHARACTERS
    for text, state in example.segments:
        # A dropped row is gone as a whole: striking all of its answer through would only make it hard to read.
        state = "kept" if example.decision == "drop" and state == "dropped" else state
        if room > 0:
            segments.append((text[:room], state))
        room -= len(text)
    return {"id": example.id, "sentence": example.sentence, "segments": segments, "more": max(0, -room)}
