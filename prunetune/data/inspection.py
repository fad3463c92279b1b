"""Looking at rows before anything is trained on them: what the model would see of them, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prunetune.core.errors import DataError
from prunetune.core.sizes import format_fraction
from prunetune.data import prepare, sources, split
from prunetune.data.audit import pieces
from prunetune.data.formats import BadRowError
from prunetune.data.prepare import Part, Report
from prunetune.data.sources import Rows
from prunetune.data.tokenise import Tokens, ends_with_stop, measure, tokenise
from prunetune.methods.samples import build_samples
from prunetune.model.score_table import ScoreTable
from prunetune.model.token_rows import IGNORED_LABEL

Shown = Literal["context", "trained", "cut"]
_SHOWN_ROWS = 3


@dataclass(frozen=True)
class ShownRow:
    """A row as the model sees it: pieces of context, trained and cut-off text."""

    place: int
    segments: list[tuple[str, Shown]]


@dataclass(frozen=True)
class Inspection:
    """What is known of a file of rows without a model.

    Args:
        name: the file.
        unit: what places count, line or row, from 1.
        rows: all rows, bad ones included.
        layout: how they are laid out, as a sentence.
        chat: the tokenizer's chat template is used.
        bad: place -> what is wrong; these rows could not be trained on.
        altered: place -> which part of the row does not come back when its tokens are decoded.
        stops: fraction of the usable rows in which the end-of-turn token is trained, before any cut.
        stops_cut: rows that lose it because they are cut.
        no_target: rows without a target token after the cut.
        facts: length_tokens (quantiles before the cut), tokens, target_tokens, target_share.
        truncated: rows longer than ``max_length``.
        max_length: tokens that rows are cut to; None: never.
        exact: place -> place of the earlier row that it repeats.
        near: place -> place of the row that it nearly repeats; None: not looked for.
        shown: some rows.
        warnings: sentences.
    """

    name: str
    unit: str
    rows: int
    layout: str
    chat: bool
    bad: dict[int, str]
    altered: dict[int, str]
    stops: float
    stops_cut: int
    no_target: int
    facts: dict[str, Any]
    truncated: int
    max_length: int | None
    exact: dict[int, int]
    near: dict[int, int] | None
    shown: list[ShownRow]
    warnings: list[str]


def inspect(
    data: str | Path | Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = 512,
    data_format: str = "auto",
    keep_raw: bool = False,
    near_duplicates: bool = True,
) -> Inspection:
    """What training would make of rows, and what is wrong with them. Bad rows are listed, not refused.

    Args:
        data: a file, a saved folder, a hub id, or rows.
        tokenizer: the model's; if it has a chat template, strings become conversations, as in training.
        max_length: tokens that training cuts rows to; None: never.
        data_format: the layout, or ``auto``.
        keep_raw: leave strings as they are even if there is a chat template.
        near_duplicates: also look for rows that nearly repeat another (MinHash; some seconds for 10,000 rows).

    Returns:
        The record.

    Raises:
        DataError: there are no rows, their layout is unknown, or none can be used.
    """
    rows, bad = _read(data)
    chat = bool(tokenizer.chat_template) and not keep_raw
    part, layout, faults = prepare.convert_some(rows, data_format, chat)
    bad |= faults
    part = prepare.one_answer_each([part], Report())[0] if part.examples else part
    part, tokens = _tokens(part, tokenizer, bad)
    if not tokens:
        raise sources.bad_rows_error(rows, bad, "No row can be used: fix them, or name the layout")
    measured = measure(tokens, max_length)
    stops = np.array([ends_with_stop(row, tokenizer) for row in tokens])
    cut = np.array([max_length is not None and len(row.ids) > max_length for row in tokens])
    found = Inspection(
        name=rows.name,
        unit=rows.unit,
        rows=len(rows.values) + sum(place not in set(rows.places) for place in bad),
        layout=layout.sentence,
        chat=chat,
        bad=dict(sorted(bad.items())),
        altered=_altered(part, tokens, tokenizer),
        stops=float(stops.mean()),
        stops_cut=int((stops & cut).sum()),
        no_target=int((measured.targets == 0).sum()),
        facts=measured.facts(),
        truncated=measured.truncated,
        max_length=max_length,
        exact=_exact(part),
        near=_near(part, tokens, tokenizer) if near_duplicates else None,
        shown=_shown(part, tokens, tokenizer, max_length),
        warnings=[],
    )
    found.warnings.extend(_warnings(found, tokenizer))
    return found


def _read(data: str | Path | Sequence[Mapping[str, Any]]) -> tuple[Rows, dict[int, str]]:
    if not isinstance(data, (str, Path)):
        values = [dict(row) for row in data]
        if not values:
            raise DataError("there are no rows to inspect; give at least one")
        return Rows("rows", values, list(range(1, len(values) + 1))), {}
    path = sources.find(str(data), None)
    if path is not None and path.suffix.lower() == ".jsonl":
        rows, faults = sources.read_jsonl(path)
        if rows.values:
            return rows, faults
    return sources.training_rows(sources.read(str(data), "the data")), {}


def _tokens(part: Part, tokenizer: Any, bad: dict[int, str]) -> tuple[Part, list[Tokens]]:
    """The rows that the chat template takes, and their tokens; the others go into ``bad``."""
    tokens: list[Tokens] = []
    keep: list[int] = []
    for index, item in enumerate(tokenise(part.examples, tokenizer)):
        if isinstance(item, BadRowError):
            bad[part.places[index]] = str(item)
        else:
            keep.append(index)
            tokens.append(item)
    return part.pick(keep), tokens


def _texts(example: Mapping[str, Any], row: Tokens, tokenizer: Any) -> tuple[list[str], list[str]]:
    """What was put into the context, and what was put in to be learnt."""

    def contents(value: Any) -> list[str]:
        return [value] if isinstance(value, str) else [message["content"] for message in value]

    if "input_ids" in example:
        return [tokenizer.decode(row.ids[: row.target_start])], [tokenizer.decode(row.ids[row.target_start :])]
    if "completion" in example:
        return contents(example["prompt"]), contents(example["completion"])
    return [], contents(example["messages"] if "messages" in example else example["text"])


def _altered(part: Part, tokens: Sequence[Tokens], tokenizer: Any) -> dict[int, str]:
    """Rows whose text does not come back from its tokens; white space does not count, templates may trim it."""
    found = {}
    for place, example, row in zip(part.places, part.examples, tokens):
        context, answers = _texts(example, row, tokenizer)
        whole, target = _bare(tokenizer.decode(row.ids)), _bare(tokenizer.decode(row.ids[row.target_start :]))
        lost = [("prompt", text) for text in context if _bare(text) not in whole]
        lost += [("answer", text) for text in answers if _bare(text) not in target]
        if lost:
            name, text = lost[0]
            found[place] = f"the {name} {_short(text)!r} does not come back from its tokens"
    return found


def _bare(text: str) -> str:
    return "".join(text.split())


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def _exact(part: Part) -> dict[int, int]:
    first: dict[str, int] = {}
    found = {}
    for place, example in zip(part.places, part.examples):
        earlier = first.setdefault(split.content_key(example), place)
        if earlier != place:
            found[place] = earlier
    return found


def _near(part: Part, tokens: Sequence[Tokens], tokenizer: Any) -> dict[int, int]:
    """Near duplicates among the different rows, as the sample method of that name finds them."""
    keep = split.distinct(part.examples)
    ids = [split.content_key(part.examples[index]) for index in keep]
    texts = [_texts(part.examples[index], tokens[index], tokenizer) for index in keep]
    table = ScoreTable(
        ids,
        np.concatenate([[0], np.cumsum([max(1, tokens[index].targets(None)) for index in keep])]).astype(np.int64),
        {
            name: np.array(["\n".join(pair[side]) for pair in texts], dtype=object)
            for side, name in enumerate(("prompt", "answer"))
        },
    )
    choice = build_samples("near_duplicates", {}).choose(table, len(keep))
    assert choice.other is not None, "a method against duplicates says of what"
    places = {name: part.places[index] for name, index in zip(ids, keep)}
    return {places[name]: places[other] for name, other in zip(ids, choice.other) if other}


def _shown(part: Part, tokens: Sequence[Tokens], tokenizer: Any, max_length: int | None) -> list[ShownRow]:
    found = []
    for index in split.sample(part.examples, _SHOWN_ROWS, "shown rows"):
        row = tokens[index]
        limit = len(row.ids) if max_length is None else max_length
        trained = np.arange(len(row.ids)) >= row.target_start
        if row.labels is not None:
            trained &= np.asarray(row.labels) != IGNORED_LABEL
        states: list[Shown] = [
            "cut" if i >= limit else "trained" if trained[i] else "context" for i in range(len(row.ids))
        ]
        found.append(ShownRow(part.places[index], pieces(tokenizer.decode, row.ids, states)))
    return found


def _warnings(found: Inspection, tokenizer: Any) -> Iterator[str]:
    usable = found.rows - len(found.bad)
    if found.bad:
        yield f"{len(found.bad)} of {found.rows} rows cannot be used; training refuses the file until they are fixed"
    if found.altered:
        yield (
            f"{len(found.altered)} of {usable} rows do not come back from their tokens: the tokenizer or the chat "
            "template changes or drops text"
        )
    if found.stops < 1:
        yield (
            f"the end-of-turn token {tokenizer.eos_token!r} is trained in {format_fraction(found.stops)} of the rows "
            "only: the model may not learn to stop. Check the chat template"
        )
    if found.stops_cut:
        yield (
            f"{found.stops_cut} of {usable} rows lose their end because they are longer than {found.max_length} "
            "tokens: they teach the model to stop in the middle, or not at all"
        )
    if found.no_target:
        yield f"{found.no_target} of {usable} rows have no target token within {found.max_length} tokens"
    repeats = len(found.exact) + len(found.near or {})
    if repeats > 0.05 * usable:
        yield (
            f"{format_fraction(repeats / usable)} of the rows repeat others ({len(found.exact)} exactly, "
            f"{len(found.near or {})} nearly): leave them out with a selection by near_duplicates"
        )
