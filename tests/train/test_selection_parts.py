"""The parts that choosing while training is made of: rows, dealing, decisions on odd tables, what is remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from prunetune.core.errors import DataError
from prunetune.train.selection_choice import StepChoice, choose_rows, step_seed
from prunetune.train.selection_memory import Memory
from prunetune.train.selection_rows import Row, deal, in_batches, rows_of
from prunetune.train.selection_scoring import RowScores, make_table
from tests.train.selecting_runs import select


def row_of(size: int, first: int = 5, prompt: int = 1) -> Row:
    """A row of ``size`` tokens whose first ``prompt`` ones are no targets."""
    ids = np.arange(first, first + size)
    return Row(ids, np.where(np.arange(size) < prompt, -100, ids))


ROWS = [row_of(7, prompt=2), row_of(3, 20), row_of(9, 40, prompt=8), row_of(2, 60)]


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("multiple", [None, 16])
def test_rows_come_back_out_of_a_batch(padding_free: bool, multiple: int | None) -> None:
    collator = DataCollatorForLanguageModeling(0, padding_free=padding_free, pad_to_multiple_of=multiple)
    found = rows_of(collator([row.example() for row in ROWS]))
    assert [row.id for row in found] == [row.id for row in ROWS]
    assert all(np.array_equal(a.labels, b.labels) for a, b in zip(found, ROWS))
    assert [list(row.positions) for row in found] == [[2, 3, 4, 5, 6], [1, 2], [8], [1]]


def test_first_token_is_no_target_whatever_its_label() -> None:
    ids = torch.arange(5, 9)[None]
    [row] = rows_of({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    assert row.id == row_of(4).id
    assert list(rows_of({"input_ids": ids, "labels": ids})[0].positions) == [1, 2, 3]


def test_id_is_of_the_content() -> None:
    assert row_of(5).id == row_of(5).id
    assert len({row_of(5).id, row_of(6).id, row_of(5, 6).id, row_of(5, prompt=2).id}) == 4


def test_dropped_tokens_lose_their_label_only() -> None:
    example = ROWS[0].example(np.array([True, False, True, True, False]))
    assert example["input_ids"] == list(range(5, 12))
    assert example["labels"] == [-100, -100, 7, -100, 9, 10, -100]


def test_batch_with_more_than_text_is_refused() -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(DataError, match="pixel_values"):
        rows_of({"input_ids": ids, "labels": ids, "pixel_values": ids})


@given(st.lists(st.integers(1, 512), max_size=40), st.integers(1, 7), st.randoms())
def test_rows_are_dealt_out_once_evenly_and_in_no_order_but_their_own(
    lengths: list[int], processes: int, random: Any
) -> None:
    names = [f"{i:03d}" for i in range(len(lengths))]
    hands = deal(lengths, names, processes)
    assert sorted(row for hand in hands for row in hand) == list(range(len(lengths)))
    assert max(map(len, hands)) <= -(-len(lengths) // processes)
    order = list(range(len(lengths)))
    random.shuffle(order)
    shuffled = deal([lengths[i] for i in order], [names[i] for i in order], processes)
    assert [[order[i] for i in hand] for hand in shuffled] == hands
    for hand in hands:
        assert [lengths[row] for row in hand] == sorted((lengths[row] for row in hand), reverse=True)
        assert [row for batch in in_batches(hand, 3) for row in batch] == hand


def test_tokens_are_balanced_where_the_rows_allow_it() -> None:
    lengths = [512, 256, 256, 128, 128, 64, 64, 64]
    loads = [sum(lengths[row] for row in hand) for hand in deal(lengths, [str(i) for i in range(8)], 2)]
    assert max(loads) - min(loads) <= 64


# ---- decisions


def table_of(nll: Any, entropy: Any = None, targets: int = 4) -> Any:
    """A table of rows with these mean statistics, and their ids in the order given."""
    nll = np.asarray(nll, dtype=np.float64)
    entropy = nll if entropy is None else np.asarray(entropy, dtype=np.float64)
    rows = sorted((row_of(targets + 1, 5 + i) for i in range(len(nll))), key=lambda row: row.id)
    scores = {
        row.id: RowScores({"nll": np.full(targets, nll[i]), "entropy": np.full(targets, entropy[i])}, {"residual": 0.0})
        for i, row in enumerate(rows)
    }
    return make_table({row.id: row for row in rows}, scores, lambda ids: np.zeros(len(ids), dtype=bool), {})


def kept(choice: StepChoice) -> int:
    """How many rows stay."""
    return sum(row.keep for row in choice.rows.values())


Q_TUNING = select({"method": "q_tuning", "kept": "50%"}, {"method": "neighbour_perplexity", "kept": "50%"})


@pytest.mark.parametrize(
    ("nll", "entropy"),
    [
        ([2.0] * 8, [2.0] * 8),
        ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8]),
        ([1, 1, 1, 1, 1, 1, 1, 1e30], [1, 2, 3, 4, 5, 6, 7, 8]),
        ([8, 7, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
    ids=["constant", "all in Q1 and Q3", "outlier of 1e30", "all in Q2 and Q4"],
)
def test_odd_steps_keep_exactly_their_share(nll: list[float], entropy: list[float]) -> None:
    choice = choose_rows(Q_TUNING, table_of(nll, entropy), {}, 0)
    assert kept(choice) == 4
    for row in choice.rows.values():
        assert not row.keep or (row.tokens is not None and row.tokens.sum() >= 1)


def test_one_row_stays_whatever_the_share() -> None:
    chosen = select({"method": "q_tuning", "kept": "0.1%"}, {"method": "loss", "kept": "0.1%"})
    choice = choose_rows(chosen, table_of([3.0]), {}, 0)
    assert kept(choice) == 1
    assert not choice.keeps_everything(), "of its tokens one stays"


def test_rows_that_cannot_be_judged_count_in_the_share_but_are_not_kept() -> None:
    unusable = {"x": "bad_score", "y": "no_target"}
    choice = choose_rows(select({"method": "loss", "kept": "50%"}), table_of([1, 2, 3, 4]), unusable, 0)
    assert kept(choice) == 3
    assert [choice.rows[name].reason for name in ("x", "y")] == ["bad_score", "no_target"]
    choice = choose_rows(select({"method": "loss", "kept": "90%"}), table_of([1, 2]), unusable, 0)
    assert kept(choice) == 2


def test_step_of_unusable_rows_keeps_the_first_by_name() -> None:
    choice = choose_rows(Q_TUNING, table_of([]), {"b": "no_target", "a": "bad_score"}, 0)
    assert choice.rows["a"].keep
    assert choice.rows["a"].reason == "floor"
    assert kept(choice) == 1


def test_step_whose_every_row_is_filtered_keeps_one() -> None:
    chosen = select({"method": "loss", "kept": "50%", "lower": 0.4, "upper": 0.6})
    choice = choose_rows(chosen, table_of([1, 2]), {}, 0)
    assert kept(choice) == 1


def test_lots_differ_from_step_to_step_and_repeat() -> None:
    chosen = select({"method": "random", "kept": "50%"})
    table = table_of(np.arange(12))
    drawn = [tuple(row.keep for row in choose_rows(chosen, table, {}, step).rows.values()) for step in range(4)]
    assert len(set(drawn)) == 4
    assert drawn[2] == tuple(row.keep for row in choose_rows(chosen, table, {}, 2).rows.values())
    assert step_seed(0, 1) != step_seed(1, 0)


# ---- the table of statistics


def scores(number: int, targets: int) -> RowScores:
    """Statistics that can be told apart."""
    nll = np.arange(targets, dtype=np.float32) + np.float32(number) / 3
    return RowScores({"nll": nll, "top1": nll > 1}, {"residual": float(np.float32(number) / 7)})


def test_memory_comes_back_from_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    memory = Memory(3)
    found = {row.id: scores(number, number + 1) for number, row in enumerate(ROWS)}
    memory.remember(dict(list(found.items())[:2]), 5)
    memory.remember(dict(list(found.items())[2:]), 6)
    memory.save(tmp_path)
    again = Memory(3)
    again.remember({row_of(30).id: scores(9, 29)}, 0)
    again.load(tmp_path)
    assert len(again) == 4
    for step in range(6, 11):
        here, there = (part.recall([row.id for row in ROWS], step) for part in (memory, again))
        # The first two were found in step 5, the others in step 6; each may be used three steps longer.
        young = ROWS if step <= 8 else ROWS[2:] if step == 9 else []
        assert list(here) == list(there) == [row.id for row in young]
        for name, entry in here.items():
            assert entry.rows == there[name].rows
            for column, values in entry.tokens.items():
                assert np.array_equal(values, there[name].tokens[column])
                assert values.dtype == there[name].tokens[column].dtype
    again.load(tmp_path / "nothing")
    assert len(again) == 0


def test_memory_forgets_what_is_too_old_and_keeps_nothing_when_it_is_off() -> None:
    memory = Memory(2)
    for step in range(6):
        memory.remember({f"{step:032x}": scores(step, 1)}, step)
    assert len(memory) == 2
    assert memory.recall([f"{4:032x}"], 6)
    assert not memory.recall([f"{4:032x}"], 7)
    off = Memory(0)
    off.remember({"00": scores(1, 1)}, 0)
    assert len(off) == 0
