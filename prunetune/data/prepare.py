"""The steps between raw rows and rows to train on: convert, drop repetitions, split, check in tokens.

Each step says what it did in the report. Reading is ``sources.py``; the order of the steps is ``load.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape

from prunetune.config.schema import DataConfig
from prunetune.core.console import note, warn
from prunetune.core.errors import DataError
from prunetune.core.sizes import format_fraction
from prunetune.data import formats, split, tokenise
from prunetune.data.formats import BadRowError
from prunetune.data.sources import Rows, bad_rows_error

Example = dict[str, Any]


@dataclass
class Report:
    """Numbers, and sentences for the person; all of them are kept in the run folder."""

    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def show(self) -> None:
        """Prints the sentences on the main process."""
        for text in self.notes:
            note(escape(text))
        for text in self.warnings:
            warn(escape(text))


@dataclass(frozen=True)
class Part:
    """Rows of one side in the form that SFTTrainer takes, and where each stands in its source."""

    source: Rows
    examples: list[Example]
    places: list[int]

    def pick(self, keep: Sequence[int]) -> Part:
        """The part with only the rows at these indices."""
        return Part(self.source, [self.examples[i] for i in keep], [self.places[i] for i in keep])


def convert(rows: Rows, wanted: str, chat: bool) -> tuple[Part, formats.Layout]:
    """Rows in the form that SFTTrainer takes.

    Raises:
        DataError: the layout is unknown or not the wanted one, or rows are malformed (all are listed).
    """
    part, layout, faults = convert_some(rows, wanted, chat)
    if faults:
        raise bad_rows_error(
            rows, faults, "Fill in or remove these rows, or set data.format if another layout is meant"
        )
    return part, layout


def convert_some(rows: Rows, wanted: str, chat: bool) -> tuple[Part, formats.Layout, dict[int, str]]:
    """The rows that can be used, how they are laid out, and what is wrong with the others, by place.

    Raises:
        DataError: the layout is unknown or not the wanted one.
    """
    layout = formats.recognise(list(dict.fromkeys(name for row in rows.values for name in row)), wanted)
    if layout.name == "messages" and not chat:
        raise DataError(
            f"{rows.name} holds conversations, and the model's tokenizer has no chat template to write "
            "them with. Use a "
            "model with one (an instruct model), or rows with prompt + completion"
        )
    turn = formats.converter(layout, chat=chat)
    part = Part(rows, [], [])
    faults: dict[int, str] = {}
    for place, row in zip(rows.places, rows.values):
        try:
            part.examples.append(turn(row))
            part.places.append(place)
        except BadRowError as error:
            faults[place] = str(error)
    return part, layout, faults


def one_answer_each(parts: list[Part], report: Report) -> list[Part]:
    """Conversations with one answer, at their end, become prompt + completion: only answers are learnt."""
    if not all(formats.single_exchanges(part.examples) for part in parts):
        return parts
    report.notes.append(
        "every conversation has one answer, at its end: they become prompt + completion, and the loss is "
        "on answers only"
    )
    return [
        Part(part.source, [formats.as_prompt_completion(item) for item in part.examples], part.places) for part in parts
    ]


def drop_repetitions(part: Part, side: str, report: Report) -> Part:
    """The part without rows that repeat an earlier one exactly."""
    kept = part.pick(split.distinct(part.examples))
    dropped = len(part.examples) - len(kept.examples)
    report.facts["duplicates"] = report.facts.get("duplicates", 0) + dropped
    if dropped:
        share = format_fraction(dropped / len(part.examples))
        report.notes.append(f"{dropped} of {len(part.examples)} {side} rows ({share}) repeat another one: left out")
    return kept


def split_off(part: Part, config: DataConfig, report: Report) -> tuple[Part, Part]:
    """Training and validation rows; no question is on both sides, and the order of the rows does not matter.

    Raises:
        DataError: there are too few rows, or the share leaves one side empty.
    """
    count = len(part.examples)
    if not 0 < config.validation_fraction < 1:
        raise DataError(
            f"data.validation_fraction is {config.validation_fraction:g} and data.validation is not set: "
            "one side "
            "would be empty. Set a share such as 5%, or name a file in data.validation"
        )
    if count < 2:
        raise DataError(
            f"{part.source.name} has {count} different row, which cannot be split into training and "
            "validation. "
            "Give at least two rows, or name a file in data.validation"
        )
    wanted = min(config.validation_rows, max(1, round(config.validation_fraction * count)), count - 1)
    questions = [formats.question_of(example) for example in part.examples]
    held = split.hold_out(questions, wanted)
    if not held:
        report.warnings.append(
            "all rows ask much the same: the validation split has its questions in common with training"
        )
        questions = [split.content_key(example) for example in part.examples]
        held = split.hold_out(questions, wanted)
    outside = [index for index, question in enumerate(questions) if question not in held]
    inside = [index for index, question in enumerate(questions) if question in held]
    report.notes.append(f"{len(inside)} of {count} rows held out for validation, chosen by their content")
    return part.pick(outside), part.pick(inside)


def warn_of_overlap(train: Part, validation: Part, report: Report) -> None:
    """Says how many questions of a given validation set are also trained on."""
    known = {formats.question_of(example) for example in train.examples}
    common = sum(formats.question_of(example) in known for example in validation.examples)
    report.facts["validation_overlap"] = common
    if common:
        report.warnings.append(
            f"{common} of {len(validation.examples)} validation rows ask what a training row asks: "
            "validation will look "
            "better than it is. Remove them from one side"
        )


def check_tokens(
    part: Part,
    side: str,
    tokenizer: Any,
    max_length: int | None,
    completion_only: bool | None,
    report: Report,
) -> tuple[Part, tokenise.Measure]:
    """The rows that still have target tokens after the cut to ``max_length``, and their lengths.

    Raises:
        DataError: the chat template refuses rows (all are listed), or no row has a target token left.
    """
    tokens: list[tokenise.Tokens] = []
    faults: dict[int, str] = {}
    for place, item in zip(part.places, tokenise.tokenise(part.examples, tokenizer, completion_only=completion_only)):
        if isinstance(item, BadRowError):
            faults[place] = str(item)
        else:
            tokens.append(item)
    if faults:
        raise bad_rows_error(part.source, faults, "Change these conversations to what the template allows")
    if not any(item.targets(None) for item in tokens):
        raise DataError(
            f"no {side} row of {part.source.name} has a target token: the chat template leaves the "
            "answers out, or the "
            "loss is masked everywhere. Check the template, or set train.completion_only to false"
        )
    measured = tokenise.measure(tokens, max_length)
    keep = [index for index, item in enumerate(tokens) if item.targets(max_length)]
    _report_lengths(measured, part, side, len(keep), report)
    if not tokenise.ends_with_stop(tokens[0], tokenizer):
        report.warnings.append(
            f"rows do not end with the end-of-text token {tokenizer.eos_token!r}: the model may not learn "
            "to stop. "
            "Check the chat template"
        )
    return part.pick(keep), tokenise.measure([tokens[index] for index in keep], max_length)


def _report_lengths(measured: tokenise.Measure, part: Part, side: str, usable: int, report: Report) -> None:
    """Warns about rows that are cut, and refuses a length that leaves nothing to learn."""
    count, limit = len(part.examples), measured.max_length
    lost = count - usable
    if side == "training":
        report.facts |= {"truncated_rows": measured.truncated, "dropped_rows": lost}
        report.facts["truncated_share"] = round(measured.truncated / count, 4)
    if not usable:
        shortest = int(measured.prompts.min())
        raise DataError(
            f"train.max_length is {limit} tokens, and the shortest {side} prompt of {part.source.name} "
            f"has {shortest}: "
            f"every answer is cut away whole. Set train.max_length to at least {measured.length_for(0.95)} "
            "(95% of the rows fit into that)"
        )
    if measured.truncated:
        share = format_fraction(measured.truncated / count)
        gone = f"; {lost} of them lose their whole answer and are left out" if lost else ""
        report.warnings.append(
            f"{measured.truncated} of {count} {side} rows ({share}) are longer than train.max_length = "
            f"{limit} tokens and "
            f"are cut at the end{gone}. 95% of the rows fit into {measured.length_for(0.95)} tokens"
        )
