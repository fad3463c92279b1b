"""Reading selections: why one row was kept or dropped, and what differs between two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prunetune.core.errors import DataError, suggest
from prunetune.core.files import read_json
from prunetune.data.selection_audit import AUDIT, TOKENS, from_runs
from prunetune.data.selection_facts import FACTS
from prunetune.data.selection_folder import TOKENIZER

State = Literal["context", "kept", "dropped"]
Decode = Callable[[Sequence[int]], str]
# Two selections can be compared token by token if they are of the same tokens; the model may differ.
_SAME = ("tokenizer_hash", "template_hash", "max_length", "targets")


@dataclass(frozen=True)
class WrittenSelection:
    """A selection's folder: its facts and its audit; tokens are read when they are needed."""

    folder: Path
    facts: dict[str, Any]
    audit: pa.Table

    @cached_property
    def tokens(self) -> pa.Table:
        """Token ids and runs of every scored row, in the audit's order."""
        return pq.read_table(self.folder / TOKENS)

    @cached_property
    def decode(self) -> Decode:
        """Token ids to text, with the tokenizer that the rows were scored with."""
        if (self.folder / TOKENIZER).is_file():
            from tokenizers import Tokenizer

            fast = Tokenizer.from_file(str(self.folder / TOKENIZER))
            return lambda ids: str(fast.decode(list(ids), skip_special_tokens=False))
        name = self.facts["scores"]["tokenizer"]
        from transformers import AutoTokenizer

        try:
            slow = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"the tokenizer {name} that the rows were scored with cannot be read, so their text cannot be shown"
            ) from error
        return lambda ids: str(slow.decode(ids))

    def segments(self, row: int) -> list[tuple[str, State]]:
        """A row's text in pieces: context, kept and dropped tokens."""
        ids = self.tokens["input_ids"][row].as_py()
        target = from_runs(self.tokens["targets"][row].as_py(), len(ids))
        kept = from_runs(self.tokens["kept"][row].as_py(), len(ids))
        states: list[State] = ["context" if not t else "kept" if k else "dropped" for t, k in zip(target, kept)]
        return pieces(self.decode, ids, states)


@dataclass(frozen=True)
class Explanation:
    """Why a row was kept or dropped, and its text in pieces of context, kept and dropped tokens."""

    id: str
    decision: str
    sentences: list[str]
    segments: list[tuple[str, State]]


@dataclass(frozen=True)
class Difference:
    """What two selections decided differently.

    Args:
        changed: id, decision and reason of both, for every row with another decision or other kept tokens.
        rows: overlap of the kept rows, Jaccard: both / either.
        tokens: the same of the kept target tokens.
        counts: (decision in the first, in the second) -> rows.
    """

    changed: list[dict[str, Any]]
    rows: float
    tokens: float
    counts: dict[tuple[str, str], int]


def read_selection(folder: Path | str) -> WrittenSelection:
    """A selection that ``write_selection`` wrote.

    Raises:
        DataError: there is none, or a part of it cannot be read.
    """
    folder = Path(folder)
    if not (folder / FACTS).is_file():
        raise DataError(f"{folder} holds no selection: {FACTS} is missing. Make one with `prunetune data select`")
    try:
        return WrittenSelection(folder, read_json(folder / FACTS), pq.read_table(folder / AUDIT))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"the selection in {folder} cannot be read ({error}). Make it again") from error


def explain(folder: Path | str, name: str) -> Explanation:
    """Why a row was kept or dropped.

    Args:
        folder: a selection.
        name: the row's id, or a beginning of it that no other id has.

    Raises:
        DataError: no row, or more than one, has such an id.
    """
    written = read_selection(folder)
    row = _find(written.audit["id"].to_pylist(), name, written.folder)
    values = {column: written.audit[column][row].as_py() for column in written.audit.column_names}
    sentences = [str(values["sentence"]), _place(values), _scores(values)]
    return Explanation(
        str(values["id"]), str(values["decision"]), [text for text in sentences if text], written.segments(row)
    )


def _find(ids: list[str], name: str, folder: Path) -> int:
    found = [row for row, other in enumerate(ids) if name and other.startswith(name)]
    exact = [row for row in found if ids[row] == name]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if found:
        some = ", ".join(ids[row] for row in found[:5])
        raise DataError(
            f"{len(found)} rows of {folder} have an id that begins with {name!r} ({some}); write more of it"
        )
    near = suggest(name, ids)
    hint = near if near.startswith("did you mean") else f"ids are the column id of {AUDIT}, e.g. {ids[0]}"
    raise DataError(f"no row of {folder} has the id {name!r}; {hint}")


def _place(values: dict[str, Any]) -> str:
    source = f"from {values['source']}, " if values["source"] else ""
    above = f", its value is above {values['percentile']:.0%} of the rows'" if np.isfinite(values["percentile"]) else ""
    return f"{source}{values['n_tokens']} tokens, {values['n_target_kept']} of {values['n_target']} targets stay{above}"


def _scores(values: dict[str, Any]) -> str:
    names = ("ppl", "entropy", "loss", "top1", "el2n", "excess", "ifd", "residual", "grad_norm", "influence")
    found = {name: values[name] for name in names if values.get(name) is not None}
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items() if np.isfinite(value))


def pieces(decode: Decode, ids: Sequence[int], states: Sequence[Any]) -> list[tuple[str, Any]]:
    """The text of neighbouring tokens of one state each.

    A piece is what its tokens add to the text before them: decoded alone, some tokenizers drop a leading space.
    """
    found: list[tuple[str, Any]] = []
    before, start = "", 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and states[end] == states[start]:
            continue
        whole = decode(ids[:end])
        text = whole[len(before) :] if whole.startswith(before) else decode(ids[start:end])
        found.append((text, states[start]))
        before, start = whole, end
    return found


def diff(first: Path | str, second: Path | str) -> Difference:
    """What two selections of the same scored rows decided differently.

    Raises:
        DataError: they are selections of different rows, or of differently cut tokens.
    """
    a, b = read_selection(first), read_selection(second)
    _require_same(a, b)
    decisions = [written.audit["decision"].to_pylist() for written in (a, b)]
    reasons = [written.audit["reason"].to_pylist() for written in (a, b)]
    runs = [written.tokens["kept"].to_pylist() for written in (a, b)]
    lengths = a.audit["n_tokens"].to_pylist()
    changed: list[dict[str, Any]] = []
    counts: dict[tuple[str, str], int] = {}
    both = either = 0
    for row, name in enumerate(a.audit["id"].to_pylist()):
        kept = [from_runs(side[row], lengths[row]) for side in runs]
        both += int((kept[0] & kept[1]).sum())
        either += int((kept[0] | kept[1]).sum())
        pair = (decisions[0][row], decisions[1][row])
        counts[pair] = counts.get(pair, 0) + 1
        if pair[0] != pair[1] or runs[0][row] != runs[1][row]:
            reason = (reasons[0][row], reasons[1][row])
            changed.append({"id": name, "first": pair[0], "second": pair[1], "reasons": reason})
    stays = [np.array([decision != "drop" for decision in side]) for side in decisions]
    rows = float((stays[0] & stays[1]).sum() / max(1, (stays[0] | stays[1]).sum()))
    return Difference(changed, rows, both / max(1, either), dict(sorted(counts.items())))


def _require_same(a: WrittenSelection, b: WrittenSelection) -> None:
    one, other = a.facts["scores"], b.facts["scores"]
    names = [name for name in _SAME if one.get(name) != other.get(name)]
    if names:
        said = "; ".join(f"{name}: {one.get(name)} and {other.get(name)}" for name in names)
        raise DataError(
            f"{a.folder} and {b.folder} are of different tokens ({said}), so they cannot be compared. Compare "
            "selections of rows that were scored with one tokenizer, template and length"
        )
    ids = [set(written.audit["id"].to_pylist()) for written in (a, b)]
    if ids[0] != ids[1]:
        raise DataError(
            f"{a.folder} and {b.folder} are selections of different rows: {len(ids[0] & ids[1])} are in both, "
            f"{len(ids[0] - ids[1])} in the first only, {len(ids[1] - ids[0])} in the second only. Compare selections "
            "of the same scored data"
        )
