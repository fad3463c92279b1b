"""Exact and near duplicates: the planted ones are found, with the row that they repeat, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from prunetune.methods.samples import build_samples
from prunetune.methods.samples.near_duplicates import _jaccard, _shingles
from tests.methods.samples.tables import WORDS, random_table

ALL = 10**6


def prose(draw, words=60):
    return " ".join(draw.choice(WORDS, words))


def edited(draw, text, changes):
    words = text.split()
    for place in draw.choice(len(words), changes, replace=False):
        words[place] = str(draw.choice(WORDS))
    return " ".join(words)


def texts_table(prompts, answers, **columns):
    rows = {"prompt": np.array(prompts, dtype=object), "answer": np.array(answers, dtype=object), **columns}
    targets = columns.pop("targets", [5] * len(prompts))
    return random_table(len(prompts), targets=targets, **{name: rows[name] for name in ("prompt", "answer")})


def planted(count=80, copies=20, changes=1, seed=0):
    """``count`` rows of which the last ``copies`` are edited copies of the first ones."""
    draw = np.random.default_rng(seed)
    prompts = [prose(draw, 40) for _ in range(count - copies)]
    answers = [prose(draw, 90) for _ in range(count - copies)]
    for row in range(copies):
        prompts.append(edited(draw, prompts[row], changes))
        answers.append(edited(draw, answers[row], changes))
    return texts_table(prompts, answers)


def test_exact_copies_are_found_and_folded():
    table = texts_table(
        ["What is it?", "what  is IT?\n", "Who?", "What is it?"], ["A cat.", " a cat.", "A cat.", "A dog."]
    )
    choice = build_samples("exact_duplicates", {}).choose(table, ALL)
    first, second = sorted((0, 1), key=lambda row: table.ids[row])
    assert choice.keep.tolist() == [row != second for row in range(4)]
    assert choice.other[second] == table.ids[first]
    assert choice.reason[second] == "duplicate"
    assert build_samples("exact_duplicates", {"fold": False}).choose(table, ALL).keep.all()


@pytest.mark.parametrize(("of", "left"), [("both", 4), ("prompt", 3), ("answer", 2)])
def test_what_must_be_equal(of, left):
    table = texts_table(["a", "a", "b", "c"], ["x", "y", "x", "x"])
    assert build_samples("exact_duplicates", {"of": of}).choose(table, ALL).keep.sum() == left


def test_the_longest_or_the_first_stays():
    table = texts_table(["a"] * 3, ["x"] * 3, targets=[2, 9, 4])
    choice = build_samples("exact_duplicates", {"keep": "longest"}).choose(table, ALL)
    assert choice.keep.tolist() == [False, True, False]
    choice = build_samples("exact_duplicates", {}).choose(table, ALL)
    assert choice.keep.argmax() == np.argmin(table.ids)
    choice = build_samples("near_duplicates", {}).choose(table, ALL)
    assert choice.keep.tolist() == [False, True, False]


def test_a_row_without_targets_stands_for_nobody():
    table = texts_table(["a", "a"], ["x", "x"], targets=[0, 3])
    choice = build_samples("exact_duplicates", {}).choose(table, ALL)
    assert choice.reason.tolist() == ["no_target", "unique"]


def test_planted_near_duplicates_are_found_with_their_originals():
    table = planted()
    choice = build_samples("near_duplicates", {}).choose(table, ALL)
    dropped = np.flatnonzero(~choice.keep)
    # Of a pair the smaller id stays, as all have as many targets.
    pairs = {frozenset((table.ids[row], choice.other[row])) for row in dropped}
    assert pairs == {frozenset((table.ids[row], table.ids[60 + row])) for row in range(20)}
    assert set(choice.reason[dropped]) == {"near_duplicate"}
    assert choice.threshold == 0.7
    assert (choice.value[dropped] >= 0.7).all()


def test_the_similarity_is_the_jaccard_of_both_parts_whichever_is_smaller():
    table = planted()
    choice = build_samples("near_duplicates", {}).choose(table, ALL)
    for row in np.flatnonzero(~choice.keep):
        other = table.ids.index(choice.other[row])
        shared = []
        for column in ("prompt", "answer"):
            first, second = (
                {tuple(text.split()[start : start + 5]) for start in range(len(text.split()) - 4)}
                for text in (table.rows[column][row], table.rows[column][other])
            )
            shared.append(len(first & second) / len(first | second))
        assert choice.value[row] == pytest.approx(min(shared))


def test_unrelated_rows_are_left_alone():
    assert build_samples("near_duplicates", {}).choose(planted(copies=0), ALL).keep.all()


def test_rewritten_rows_are_no_near_duplicates():
    assert build_samples("near_duplicates", {}).choose(planted(changes=20), ALL).keep.all()


def test_the_same_prompt_or_the_same_answer_alone_is_no_repeat():
    draw = np.random.default_rng(0)
    prompts, answers = [prose(draw) for _ in range(10)], [prose(draw) for _ in range(10)]
    same_prompt = texts_table([*prompts, *prompts], [*answers, *(prose(draw) for _ in range(10))])
    same_answer = texts_table([*prompts, *(prose(draw) for _ in range(10))], [*answers, *answers])
    for table, of in ((same_prompt, "prompt"), (same_answer, "answer")):
        assert build_samples("near_duplicates", {}).choose(table, ALL).keep.sum() == 20
        assert build_samples("near_duplicates", {"of": of}).choose(table, ALL).keep.sum() == 10
    # Joined they are half alike: not enough for 0.7, enough for 0.2.
    assert build_samples("near_duplicates", {"of": "joined"}).choose(same_answer, ALL).keep.sum() == 20
    assert (
        build_samples("near_duplicates", {"of": "joined", "threshold": 0.2}).choose(same_answer, ALL).keep.sum() == 10
    )


def test_a_column_that_says_the_same_everywhere_is_not_compared():
    draw = np.random.default_rng(0)
    answers = [prose(draw) for _ in range(30)]
    table = texts_table([""] * 31, [*answers, edited(draw, answers[4], 1)])
    assert build_samples("near_duplicates", {}).choose(table, ALL).keep.sum() == 30


def test_short_and_empty_texts():
    assert _shingles("One two", 5) == {"one two"}
    assert _shingles("", 5) == {""}
    assert _shingles("a b c", 2) == {"a b", "b c"}
    assert _jaccard(_shingles("a b c d", 2), _shingles("b c d e", 2)) == 0.5
    table = texts_table(["", "", "?", "yes"], ["no", "No!", "no", "no"])
    choice = build_samples("near_duplicates", {}).choose(table, ALL)
    # The question mark is no word: three rows say nothing and no.
    assert choice.keep.sum() == 2


def test_of_two_equally_similar_rows_the_smaller_id_is_named():
    # The last shares five of seven words with each of the others, which share four of eight.
    words = ["a b c d e f", "c d e f g h", "b c d e f g"]
    options = {"of": "answer", "ngram": 1, "threshold": 0.6}
    whole = texts_table(["q"] * 3, words, targets=[9, 9, 1])
    for order in ([0, 1, 2], [1, 0, 2]):
        table = whole.pick(np.array(order))
        choice = build_samples("near_duplicates", options).choose(table, ALL)
        assert choice.other.tolist() == ["", "", min(table.ids[:2])]
        assert choice.value[2] == pytest.approx(5 / 7)


def test_if_fewer_are_asked_for_lots_decide_among_those_that_are_left():
    table = planted()
    whole = build_samples("near_duplicates", {}).choose(table, ALL)
    some = [build_samples("near_duplicates", {}, seed).choose(table, 25) for seed in (0, 1)]
    for choice in some:
        assert choice.keep.sum() == 25
        assert not (choice.keep & ~whole.keep).any()
        assert (choice.reason == "near_duplicate").sum() == 20
        assert (choice.reason == "not_drawn").sum() == 35
    assert some[0].keep.tolist() != some[1].keep.tolist()
