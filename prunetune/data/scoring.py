"""From rows to a finished folder of scores: ids, tokens, shards. Resumable by shard, on any number of processes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunetune.core.console import note
from prunetune.core.errors import DataError
from prunetune.core.files import read_json, sweep, write_json
from prunetune.data import store
from prunetune.data.gradients import AdamMoments, with_adapters
from prunetune.data.identity import digest, model_hash, row_id, rows_hash, template_hash, tokenizer_hash
from prunetune.data.scorer import Scorer, ScoringOptions
from prunetune.data.store import StoredScores
from prunetune.model.score_table import ScoreTable
from prunetune.model.token_rows import TokenRow, encode_rows, is_conversational

_SECONDS = "seconds.json"


@dataclass(frozen=True)
class RowsToScore:
    """Distinct rows, sorted by id, cut to length.

    Args:
        ids: content ids. examples: what the chat template is given. rows: tokens and labels.
        columns: row columns that need no model. opening: what an answer without its prompt begins behind.
    """

    ids: list[str]
    examples: list[dict[str, Any]]
    rows: list[TokenRow]
    columns: dict[str, np.ndarray]
    opening: list[int]

    def pick(self, span: slice) -> RowsToScore:
        """Neighbouring rows."""
        columns = {name: column[span] for name, column in self.columns.items()}
        return RowsToScore(self.ids[span], self.examples[span], self.rows[span], columns, self.opening)


def rows_to_score(
    dataset: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None,
    completion_only: bool | None = None,
    assistant_only: bool = False,
) -> RowsToScore:
    """Tokens and ids of rows in prompt-completion, messages or text form; exact repetitions are scored once.

    Columns ``source`` and ``label`` of the rows are carried along for stratified selections.

    Raises:
        DataError: there is no row, or none has a target token within ``max_length``.
    """
    distinct = {row_id(row): dict(row) for row in reversed(list(dataset))}
    ids = sorted(distinct)
    examples = [distinct[name] for name in ids]
    whole = encode_rows(tokenizer, examples, completion_only=completion_only, assistant_only=assistant_only)
    rows = [row.cut(max_length) for row in whole]
    if not any(row.targets for row in rows):
        raise DataError(
            f"none of {len(rows)} rows has a target token within {max_length} tokens; set a larger --max-length, or "
            "check the answers and the chat template"
        )
    columns = {
        "truncated": np.array([len(row.input_ids) < len(long.input_ids) for row, long in zip(rows, whole)], dtype=bool),
        "prompt": _objects([_text(example, "prompt") for example in examples]),
        "answer": _objects([_text(example, "completion", "messages", "text") for example in examples]),
    }
    for name in ("source", "label"):
        if any(example.get(name) is not None for example in examples):
            columns[name] = _objects([str(example.get(name, "")) for example in examples])
    return RowsToScore(ids, examples, rows, columns, _opening(tokenizer, examples))


def score(
    dataset: Sequence[Mapping[str, Any]],
    model: Any,
    tokenizer: Any,
    *,
    folder: Path | str | None = None,
    max_length: int | None = 512,
    options: ScoringOptions | None = None,
    reference: Any = None,
    validation: Sequence[Mapping[str, Any]] = (),
    moments: AdamMoments | None = None,
    completion_only: bool | None = None,
    assistant_only: bool = False,
    seed: int = 0,
    process: tuple[int, int] = (0, 1),
    names: Mapping[str, Any] | None = None,
) -> StoredScores | None:
    """Scores every row once: token losses, entropies, EL2N, and what ``options`` add. No gradients but for influence.

    Args:
        dataset: rows in prompt-completion (plain or conversational), messages or text form.
        model: a ``*ForCausalLM`` or a PeftModel. tokenizer: its tokenizer.
        folder: where shards go as they are done; a stopped pass goes on there. None: nothing is written.
        max_length: tokens that rows are cut to, as in training.
        options: what is found beside the token statistics.
        reference: a second model of the same tokenizer, or ``"base"`` for a PeftModel with its adapters off.
        validation: rows that ``influence`` is about.
        moments: Adam's moments of the run that trained the PeftModel's adapters, for ``influence``.
        completion_only: see ``encode_rows``. assistant_only: see ``encode_rows``.
        seed: of random projections.
        process: (rank, number of processes); each takes every n-th shard, and only rank 0 of a finished pass reads.
        names: further entries of the header, e.g. the model's name.

    Returns:
        The scores; None if other processes still have shards to do.

    Raises:
        DataError: no usable row, or ``folder`` holds scores of something else.

    Example:
        >>> scores = score(rows, model, tokenizer)                               # doctest: +SKIP
        >>> float(scores.table.mean(scores.table.tokens["nll"])[0])              # doctest: +SKIP
    """
    options = options or ScoringOptions()
    todo = rows_to_score(
        dataset, tokenizer, max_length=max_length, completion_only=completion_only, assistant_only=assistant_only
    )
    header = {
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "template_hash": template_hash(tokenizer),
        "max_length": max_length,
        "targets": {"completion_only": completion_only, "assistant_only": assistant_only},
        "model_hash": model_hash(model),
        "reference_hash": reference if reference in (None, "base") else model_hash(reference),
        "rows_hash": rows_hash(todo.ids),
        "extras": sorted(options.extras),
        "rows": len(todo.ids),
        **(names or {}),
    }
    asked: list[TokenRow] = []
    if "influence" in options.extras:
        asked = [row.cut(max_length) for row in encode_rows(tokenizer, list(validation))]
        header["influence_hash"] = digest([row.input_ids for row in asked], moments and moments.hash)
        model = model if hasattr(model, "peft_config") else with_adapters(model, seed)
    scorer = Scorer(model, tokenizer, options, reference=reference, validation=asked, moments=moments, seed=seed)
    if folder is None:
        table = scorer.table(todo.ids, todo.rows, todo.columns, todo.opening)
        return _stored(table, todo, {**header, "facts": scorer.facts, "complete": True})
    return _score_into(Path(folder), todo, scorer, header, process)


def _score_into(
    folder: Path, todo: RowsToScore, scorer: Scorer, header: dict[str, Any], process: tuple[int, int]
) -> StoredScores | None:
    """Shards that are not there yet, then the header if all are."""
    rank, processes = process
    spans = list(store.spans(len(todo.ids)))
    if (folder / store.HEADER).is_file():
        there = store.read_header(folder)
        store.require_same(there, header, folder)
        missing = sorted(set(header["extras"]) - set(there["extras"]))
        if missing:
            raise DataError(f"{folder} was scored without {', '.join(missing)}. Name another folder for a fuller pass")
        if there.get("complete"):
            note(f"{folder} is finished already: {len(todo.ids)} rows")
            return store.read_scores(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} exists and holds no scores; name another folder")
    else:
        write_json(folder / store.HEADER, {**header, "complete": False})
    for number, span in list(enumerate(spans))[rank::processes]:
        path = store.shard_path(folder, number)
        if path.is_file():
            continue
        part, start = todo.pick(span), time.perf_counter()
        table = scorer.table(part.ids, part.rows, part.columns, part.opening)
        store.write_shard(path, _stored(table, part, {}))
        write_json(path.with_suffix(".json"), {_SECONDS: time.perf_counter() - start})
        note(f"shard {number + 1} of {len(spans)}: rows {span.start + 1} to {span.stop}")
    paths = [store.shard_path(folder, number) for number in range(len(spans))]
    if not all(path.is_file() for path in paths) or rank != 0:
        return None
    sweep(folder / store.SHARDS)
    seconds = sum(
        read_json(path.with_suffix(".json"))[_SECONDS] for path in paths if path.with_suffix(".json").is_file()
    )
    tokens = sum(len(row.input_ids) for row in todo.rows)
    done = {**header, "facts": scorer.facts, "seconds": round(seconds, 2), "scored_tokens": tokens, "complete": True}
    write_json(folder / store.HEADER, done)
    return store.read_scores(folder)


def _stored(table: ScoreTable, todo: RowsToScore, header: Mapping[str, Any]) -> StoredScores:
    ids = [row.input_ids for row in todo.rows]
    return StoredScores(table, todo.examples, ids, [row.labels for row in todo.rows], header)


def _objects(values: Sequence[str]) -> np.ndarray:
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def _text(example: Mapping[str, Any], *names: str) -> str:
    """The text of the first of these columns that the row has."""
    value: Any = next((example[name] for name in names if example.get(name)), "")
    return value if isinstance(value, str) else "\n".join(str(message.get("content") or "") for message in value)


def _opening(tokenizer: Any, examples: Sequence[Mapping[str, Any]]) -> list[int]:
    """What the chat template writes before an answer; without a template the end-of-text token."""
    first = examples[0]
    if is_conversational(first):
        turns = [{"role": "user", "content": "a"}]
        asked = tokenizer.apply_chat_template(turns, tokenize=False)
        opened = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        header = list(tokenizer(opened[len(asked) :], add_special_tokens=False)["input_ids"])
        if opened.startswith(asked) and header:
            return header
    return [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
