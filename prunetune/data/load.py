"""From the ``data`` section of a configuration to rows that SFTTrainer takes, and facts about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.config.schema import DataConfig
from prunetune.core.errors import DataError
from prunetune.core.records import DataBundle
from prunetune.core.sizes import format_fraction
from prunetune.data import prepare, prose, pydocs, sources, split
from prunetune.data.prepare import Part, Report
from prunetune.data.sources import Rows

PYDOCS = "pydocs"


def load_bundle(
    config: DataConfig,
    *,
    tokenizer: Any,
    max_length: int | None,
    seed: int = 0,
    folder: Path | None = None,
    completion_only: bool | None = None,
    keep_raw: bool = False,
) -> DataBundle:
    """Rows for training and validation: checked, split, and measured in tokens.

    Args:
        config: the ``data`` section.
        tokenizer: the base model's tokenizer; if it has a chat template, strings become conversations.
        max_length: tokens that training cuts rows to; None: never.
        seed: decides which rows ``max_rows`` takes. The validation split depends on the rows' content alone.
        folder: where relative paths are also looked for (the configuration's folder).
        completion_only: ``train.completion_only``, for counting target tokens.
        keep_raw: leave strings as they are even if there is a chat template.

    Returns:
        The bundle. Its ``facts`` are JSON values: source, format, rows, validation_rows, duplicates,
        length_tokens (quantiles before the cut), tokens, target_tokens, target_share, truncated_rows,
        dropped_rows, notes, warnings.

    Raises:
        DataError: rows are missing or malformed (all are listed), or no target token is left.
    """
    report = Report(facts={"source": config.train})
    chat = bool(tokenizer.chat_template) and not keep_raw
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer has no end-of-text token, so no model could learn to stop. Set its eos_token")
    train, validation = _read(config, chat, folder, report)
    train = prepare.drop_repetitions(train, "training", report)
    if validation is None:
        train, validation = prepare.split_off(train, config, report)
    else:
        validation = prepare.drop_repetitions(validation, "validation", report)
        prepare.warn_of_overlap(train, validation, report)
    train = train.pick(split.sample(train.examples, config.max_rows, "training rows", seed))
    validation = validation.pick(split.sample(validation.examples, config.validation_rows, "validation rows"))
    validation, _ = prepare.check_tokens(validation, "validation", tokenizer, max_length, completion_only, report)
    train, measured = prepare.check_tokens(train, "training", tokenizer, max_length, completion_only, report)
    general = _general_text(config, folder, train)
    report.facts = {**measured.facts(), **report.facts}
    report.facts |= {"rows": len(train.examples), "validation_rows": len(validation.examples)}
    report.facts |= {
        "general_text_characters": len(general),
        "notes": report.notes,
        "warnings": report.warnings,
    }
    report.show()
    return DataBundle(
        train=_dataset(train),
        validation=_dataset(validation),
        general_text=general,
        description=_description(report.facts),
        facts=report.facts,
    )


def _read(config: DataConfig, chat: bool, folder: Path | None, report: Report) -> tuple[Part, Part | None]:
    """Both sides, converted; validation is None if it has to be split off."""
    given: Rows | None = None
    if config.train == PYDOCS:
        train, given = _pydocs(config, report)
    else:
        splits = sources.read(config.train, "data.train", folder)
        train = sources.training_rows(splits)
        given = sources.held_out_rows(splits)
        if given is not None and config.validation is None:
            report.notes.append(f"validation rows are the source's own: {given.name}")
    if config.validation == PYDOCS:
        given = _pydocs(config, report)[1]
    elif config.validation is not None:
        splits = sources.read(config.validation, "data.validation", folder)
        given = sources.held_out_rows(splits) or splits.get("test") or sources.training_rows(splits)
    part, layout = prepare.convert(train, config.format, chat)
    report.facts["format"] = layout.name
    report.notes.append(f"{train.name}: {layout.sentence}")
    if given is None:
        return prepare.one_answer_each([part], report)[0], None
    # Held-out rows may be laid out in another way, but a format that was asked for holds for both.
    held, _ = prepare.convert(given, config.format if config.validation != PYDOCS else "auto", chat)
    part, held = prepare.one_answer_each([part, held], report)
    return part, held


def _pydocs(config: DataConfig, report: Report) -> tuple[Rows, Rows]:
    """The embedded default as rows, with a sentence on what it was made from."""
    docs = pydocs.load(config.validation_fraction)

    def rows(questions: tuple[pydocs.Question, ...]) -> Rows:
        values = [{"prompt": item.prompt, "completion": item.completion} for item in questions]
        return Rows(PYDOCS, values, list(range(1, len(values) + 1)))

    report.notes.append(
        f"pydocs: questions about {docs.standard_modules} standard modules and {docs.packages} installed "
        "packages; "
        f"validation asks about {len(docs.held_out)} of them that training never mentions"
    )
    report.facts["held_out_modules"] = list(docs.held_out)
    return rows(docs.train), rows(docs.validation)


def _general_text(config: DataConfig, folder: Path | None, train: Part) -> str:
    """The text for the general perplexity; the default has no sentence in common with the answers."""
    if config.general_text is None:
        return prose.general_text(avoid=_answers(train))
    path = sources.find(config.general_text, folder)
    if path is None or not path.is_file():
        raise DataError(
            f"data.general_text is {config.general_text}, and there is no such file. Check the path, or leave it out"
        )
    text = sources.read_text(path)
    if not text.strip():
        raise DataError(
            f"data.general_text is {config.general_text}, and the file is empty. Give prose, or leave it out"
        )
    return text


def _answers(part: Part) -> list[str]:
    """What the model is trained to say; not known of rows that are tokens already."""
    found = []
    for example in part.examples:
        value: Any = example.get("completion") or example.get("messages") or example.get("text") or ""
        found.append(value if isinstance(value, str) else " ".join(message["content"] for message in value))
    return found


def _dataset(part: Part) -> Any:
    import datasets

    return datasets.Dataset.from_list(part.examples)


def _description(facts: dict[str, Any]) -> str:
    """One line for tables and cards."""
    lengths = facts["length_tokens"]
    return (
        f"{facts['source']}: {facts['rows']} training and {facts['validation_rows']} validation rows "
        f"({facts['format']}), "
        f"median {lengths['p50']} and longest {lengths['max']} tokens, "
        f"{format_fraction(facts['target_share'])} of the tokens are targets"
    )
