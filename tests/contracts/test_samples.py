"""The contract of every registered sample method, found by discovery: a new file is tested here at once."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest

from prunetune.core.errors import ConfigError, DataError
from prunetune.methods.samples import SAMPLES, SampleMethod, build_samples, check_samples
from prunetune.model.score_table import ScoreTable
from tests.methods.samples.tables import empty_table, filled, random_table, with_outlier

NAMES = SAMPLES.names()
by_name = pytest.mark.parametrize("name", NAMES)
# InfoBatch drops a share of the easy rows, however many there are: the count is not its to choose.
by_counting_name = pytest.mark.parametrize("name", [name for name in NAMES if name != "infobatch"])
# Everything is random or the words are all there is to say.
WITHOUT_PAPER = {"random", "exact_duplicates"}
KEPT_REASONS = {"top", "Q2", "Q4", "topup", "drawn", "unique", "chosen", "above"}
DROPPED_REASONS = {
    *("below", "bad_score", "no_target", "filtered", "Q1", "Q3", "middle", "trimmed", "not_drawn", "hardest"),
    *("duplicate", "near_duplicate", "semantic_duplicate", "covered", "unaided", "truncated", "below_mean"),
}
DEGENERATE = {
    "one row": random_table(1),
    "no row": empty_table(),
    "no target anywhere": random_table(5, targets=[0] * 5),
    "rows without targets": random_table(12, targets=[0, 1, 2, 0, 3, 4, 5, 0, 1, 1, 9, 0]),
    "all NaN": filled(np.nan),
    "all infinite": filled(np.inf),
    "all equal": filled(1.5),
    "all zero": filled(0.0),
    "one row of 1e30": with_outlier(1e30),
    "one row of NaN": with_outlier(np.nan),
    "one infinite row": with_outlier(np.inf),
}


def judged(table: ScoreTable, name: str) -> int:
    return int((np.isfinite(build_samples(name, {}).scores(table)) & (table.targets > 0)).sum())


def same(left: np.ndarray | None, right: np.ndarray | None) -> bool:
    if left is None or right is None:
        return left is right
    if left.dtype == object:
        return left.tolist() == right.tolist()
    return bool(np.array_equal(left, right, equal_nan=left.dtype.kind == "f"))


def test_the_methods_are_found():
    assert {
        *("random", "length", "perplexity", "entropy", "loss", "el2n", "last_layer_gradient", "ifd", "donod"),
        *("q_tuning", "effort_influence", "less", "exact_duplicates", "near_duplicates", "semantic_duplicates"),
        *("diversity", "infobatch"),
    } <= set(NAMES)


@by_name
def test_docstring_paper_and_options(name):
    kind = SAMPLES.get(name)
    assert issubclass(kind, SampleMethod)
    assert SAMPLES.summary(name) == kind.__dict__["__doc__"].strip().splitlines()[0]
    assert 20 <= len(SAMPLES.summary(name)) <= 120
    assert all(field.description for field in kind.Options.model_fields.values())
    if name not in WITHOUT_PAPER:
        assert re.fullmatch(r"arXiv \d{4}\.\d{5}(, \d{4}\.\d{5})*", kind.paper)


@pytest.mark.parametrize("count", [1, 17, 53])
@by_counting_name
def test_exactly_so_many_rows_are_kept(name, count):
    choice = build_samples(name, {}).choose(random_table(60, seed=3), count)
    assert choice.keep.sum() == count


@by_counting_name
def test_no_row_or_every_row_that_can_be_judged(name):
    method, table = build_samples(name, {}), random_table(40, seed=4, targets=[0, 3] * 20, direct_nll=50.0)
    for count in (0, -3):
        choice = method.choose(table, count)
        assert not choice.keep.any()
    for count in (20, 21, 10**9):
        assert method.choose(table, count).keep.tolist() == [False, True] * 20


@by_name
def test_shapes_and_reasons(name):
    table = random_table(50, seed=5)
    choice = build_samples(name, {}).choose(table, 20)
    assert choice.keep.dtype == bool
    assert choice.value.dtype == np.float64
    for column in (choice.keep, choice.value, choice.reason, choice.prunable, choice.weight, choice.other):
        assert column is None or len(column) == 50
    assert set(choice.reason[choice.keep]) <= KEPT_REASONS
    assert set(choice.reason[~choice.keep]) <= DROPPED_REASONS
    assert KEPT_REASONS.isdisjoint(DROPPED_REASONS)
    if choice.prunable is not None:
        assert not (choice.prunable & ~choice.keep).any()


@by_name
def test_the_order_of_the_rows_changes_nothing(name):
    # Where all are equal something else than the order must decide.
    for table in (random_table(60, seed=6), filled(1.5, 30), with_outlier(1e30, 30)):
        for count in (1, 11):
            straight = build_samples(name, {}, seed=2).choose(table, count)
            for seed in range(3):
                order = np.random.default_rng(seed).permutation(len(table))
                shuffled = build_samples(name, {}, seed=2).choose(table.pick(order), count)
                assert shuffled.threshold == straight.threshold
                for column in ("keep", "value", "reason", "prunable", "weight", "other"):
                    whole = getattr(straight, column)
                    assert same(None if whole is None else whole[order], getattr(shuffled, column)), column


@by_name
def test_scores_do_not_depend_on_the_order_and_are_repeatable(name):
    table = random_table(30, seed=7)
    order = np.random.default_rng(0).permutation(30)
    scores = build_samples(name, {}).scores(table)
    assert scores.shape == (30,)
    assert same(scores, build_samples(name, {}).scores(table))
    assert same(scores[order], build_samples(name, {}).scores(table.pick(order)))


@by_name
def test_the_table_is_not_written_to(name):
    table = random_table(30, seed=8)
    before = {key: column.copy() for key, column in {**table.rows, **table.tokens}.items()}
    build_samples(name, {}).choose(table, 10)
    for key, column in {**table.rows, **table.tokens}.items():
        assert same(column, before[key]), key


@pytest.mark.parametrize("case", DEGENERATE)
@by_name
def test_degenerate_tables_are_defined(name, case):
    table = DEGENERATE[case]
    method = build_samples(name, {})
    for count in (0, 1, 4, 10**6):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            choice = method.choose(table, count)
        assert not choice.keep[table.targets == 0].any()
        assert (choice.reason[table.targets == 0] == "no_target").all()
        assert set(choice.reason[choice.keep]) <= KEPT_REASONS
        assert set(choice.reason[~choice.keep]) <= DROPPED_REASONS
        assert choice.threshold is None or np.isfinite(choice.threshold)
        assert not np.isinf(choice.value).any() or "infinite" in case
        if name != "infobatch":
            assert choice.keep.sum() <= count


@by_name
def test_rows_whose_scores_are_no_numbers_are_dropped_as_such(name):
    table = with_outlier(np.nan)
    choice = build_samples(name, {}).choose(table, 19)
    numbers = {"nll", "entropy", "el2n", "residual", "grad_norm", "direct_nll", "embedding", "influence"}
    if SAMPLES.get(name).needs & numbers:
        assert choice.reason[3] == "bad_score"
        assert not choice.keep[3]
    else:
        assert choice.reason[3] != "bad_score"


@by_counting_name
def test_one_wild_row_is_the_only_one_that_is_hurt(name):
    """An outlier costs at most its own place: nothing else becomes unjudged."""
    choice = build_samples(name, {}).choose(with_outlier(1e30), 18)
    assert choice.keep.sum() == 18 if name != "ifd" else choice.keep.sum() >= 15


@by_name
def test_missing_columns_are_named(name):
    kind, table = SAMPLES.get(name), random_table(5)
    for missing in kind.needs:
        rows = {key: column for key, column in table.rows.items() if key != missing}
        tokens = {key: column for key, column in table.tokens.items() if key != missing}
        with pytest.raises(DataError, match=missing):
            build_samples(name, {}).choose(ScoreTable(table.ids, table.offsets, rows, tokens, table.facts), 2)


@by_name
def test_only_what_is_named_is_needed(name):
    table = random_table(20, seed=9)
    needs = SAMPLES.get(name).needs
    small = ScoreTable(
        table.ids,
        table.offsets,
        {key: column for key, column in table.rows.items() if key in needs},
        {key: column for key, column in table.tokens.items() if key in needs},
        table.facts,
    )
    assert build_samples(name, {}).choose(small, 5).keep.any()


@by_name
def test_unknown_options_are_refused_with_a_suggestion(name):
    known = next(iter(SAMPLES.get(name).Options.model_fields), None)
    with pytest.raises(ConfigError) as caught:
        build_samples(name, {f"{known or 'x'}z": 1})
    assert (f"did you mean {known!r}" if known else "it has no options") in str(caught.value)
    assert len(check_samples(name, {f"{known or 'x'}z": 1})) == 1
    assert check_samples(name, {}) == []


def test_unknown_methods_are_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'q_tuning'"):
        build_samples("q_tunning", {})
