"""Why one row was kept or dropped, and what differs between two selections."""

from __future__ import annotations

import pytest

from prunetune.core.errors import DataError
from prunetune.data.audit import diff, explain, pieces, read_selection
from prunetune.data.selection import select
from prunetune.data.selection_folder import write_selection
from tests.data.selections import stored, tokenizer_folder
from tests.support import tiny_tokenizer


@pytest.fixture
def kept(tmp_path):
    """A folder with a selection that drops rows and tokens, and the selection."""
    selection = select(
        stored(tokenizer=tokenizer_folder(tmp_path / "tokenizer")),
        samples_method="q_tuning", samples_kept=0.5, tokens_method="neighbour_perplexity", tokens_kept=0.5,
    )  # fmt: skip
    write_selection(selection, tmp_path / "kept")
    return tmp_path / "kept", selection


def row_with(folder, decision):
    audit = read_selection(folder).audit.to_pydict()
    return next(i for i, found in enumerate(audit["decision"]) if found == decision)


@pytest.mark.parametrize("decision", ["keep", "mask", "drop"])
def test_explain_says_why_and_marks_the_text(kept, decision):
    folder, selection = kept
    row = row_with(folder, decision)
    name = selection.scores.table.ids[row]
    found = explain(folder, name[:6])
    assert found.id == name
    assert found.decision == decision
    assert found.sentences[0].startswith("dropped: " if decision == "drop" else "kept: ")
    assert "of" in found.sentences[1]
    assert "ppl" in found.sentences[2]
    assert "".join(text for text, _ in found.segments) == tiny_tokenizer().decode(selection.scores.input_ids[row])
    states = {state for _, state in found.segments}
    assert states == {"keep": {"context", "kept"}, "drop": {"context", "dropped"}}.get(
        decision, {"context", "kept", "dropped"}
    )


def test_explain_works_when_scores_and_tokenizer_are_gone(kept, tmp_path):
    folder, selection = kept
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    assert explain(folder, selection.scores.table.ids[0]).segments


@pytest.mark.parametrize(("name", "said"), [("nothing", "e.g. "), ("", "e.g. ")])
def test_unknown_ids_are_refused(kept, name, said):
    with pytest.raises(DataError, match=said):
        explain(kept[0], name)


def test_a_misspelt_id_gets_a_suggestion_and_a_short_one_asks_for_more(kept):
    folder, selection = kept
    ids = selection.scores.table.ids
    slip = ("0" if ids[3][0] != "0" else "1") + ids[3][1:]
    with pytest.raises(DataError, match=f"did you mean '{ids[3]}'"):
        explain(folder, slip)
    first = ids[0][0]
    assert sum(name[0] == first for name in ids) > 1, "the test's ids share a first character"
    with pytest.raises(DataError, match="write more of it"):
        explain(folder, first)


def test_a_folder_without_a_selection_is_refused(tmp_path):
    with pytest.raises(DataError, match="prunetune data select"):
        explain(tmp_path, "x")


def test_pieces_join_to_the_text_whatever_the_tokenizer_does_with_spaces():
    def decode(ids):
        return " ".join(f"w{i}" for i in ids)

    found = pieces(decode, [1, 2, 3, 4], ["a", "a", "b", "a"])
    assert found == [("w1 w2", "a"), (" w3", "b"), (" w4", "a")]
    assert pieces(decode, [], []) == []
    # A decoder whose text changes when more follows: each piece is decoded for itself.
    assert pieces(lambda ids: "x" * (5 - len(ids)), [1, 2], ["a", "b"]) == [("xxxx", "a"), ("xxxx", "b")]


def test_diff_counts_changes_and_overlap(tmp_path):
    scores = stored(20)
    a = select(scores, samples_method="random", samples_kept=0.5, seed=0)
    b = select(scores, samples_method="random", samples_kept=0.5, seed=1)
    c = select(scores, samples_method="random", samples_kept=0.5, tokens_method="loss", tokens_kept=0.5)
    for name, selection in (("a", a), ("b", b), ("c", c)):
        write_selection(selection, tmp_path / name)
    same = diff(tmp_path / "a", tmp_path / "a")
    assert (same.changed, same.rows, same.tokens) == ([], 1.0, 1.0)
    found = diff(tmp_path / "a", tmp_path / "b")
    both = int((a.choice.keep & b.choice.keep).sum())
    assert found.rows == both / (20 - both)
    assert len(found.changed) == 2 * (10 - both)
    assert found.counts["keep", "keep"] == both
    masked = diff(tmp_path / "a", tmp_path / "c")
    assert masked.rows == 1.0
    assert masked.tokens == c.kept.sum() / a.kept.sum()
    assert {entry["second"] for entry in masked.changed} == {"mask"}


def test_selections_of_other_rows_or_tokens_are_not_compared(tmp_path):
    write_selection(select(stored(20)), tmp_path / "a")
    write_selection(select(stored(20, seed=9)), tmp_path / "rows")
    write_selection(select(stored(20, tokenizer_hash="u")), tmp_path / "tokens")
    with pytest.raises(DataError, match="selections of different rows: 0 are in both"):
        diff(tmp_path / "a", tmp_path / "rows")
    with pytest.raises(DataError, match="tokenizer_hash: t and u"):
        diff(tmp_path / "a", tmp_path / "tokens")
