"""Strata: proportions, minimums, and every row of the count whatever a stratum can give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunetune.core.errors import DataError
from prunetune.methods.samples import build_samples
from prunetune.methods.samples._stratify import choose_stratified, make_strata, split_count
from tests.methods.samples.tables import filled, random_table


def per_stratum(choice, strata):
    return {name: int(choice.keep[strata == name].sum()) for name in sorted(set(strata.tolist()))}


def sources(**counts):
    return np.array([name for name, count in counts.items() for _ in range(count)], dtype=object)


def test_strata_by_source_label_and_length():
    table = random_table(
        6,
        targets=[1, 2, 3, 4, 50, 60],
        source=np.array(["a", "b"] * 3, dtype=object),
        label=np.array(["x"] * 3 + ["y"] * 3, dtype=object),
    )
    assert make_strata(table, ["source"]).tolist() == ["a", "b"] * 3
    assert make_strata(table, ["label", "source"])[:2].tolist() == ["x, a", "x, b"]
    halves = ["1-3 targets"] * 3 + ["4-60 targets"] * 3
    assert make_strata(table, ["length"], bins=2).tolist() == halves
    assert make_strata(table, [], bins=2).tolist() == [""] * 6


def test_length_bins_hold_about_as_many_rows_each():
    names, counts = np.unique(
        make_strata(random_table(400, targets=list(range(1, 401))), ["length"], 4), return_counts=True
    )
    assert len(names) == 4
    assert counts.tolist() == [100] * 4
    assert len(set(make_strata(random_table(10, targets=[7] * 10), ["length"]).tolist())) == 1


def test_strata_do_not_depend_on_the_order_of_rows():
    table = random_table(50)
    order = np.random.default_rng(0).permutation(50)
    by = ["source", "length"]
    assert make_strata(table, by)[order].tolist() == make_strata(table.pick(order), by).tolist()


def test_a_missing_column_is_named():
    table = random_table(3)
    rows = {name: column for name, column in table.rows.items() if name != "label"}
    with pytest.raises(DataError, match="label"):
        make_strata(type(table)(table.ids, table.offsets, rows, table.tokens), ["label"])


def test_the_proportions_are_kept_by_largest_remainder():
    strata = sources(a=50, b=30, c=20)
    choice = choose_stratified(build_samples("loss", {}), random_table(100), 11, strata)
    # 5.5, 3.3 and 2.2: the one left over goes to a.
    assert per_stratum(choice, strata) == {"a": 6, "b": 3, "c": 2}


def test_inside_a_stratum_the_method_decides():
    table, strata = random_table(60), sources(a=40, b=20)
    choice = choose_stratified(build_samples("loss", {}), table, 15, strata)
    loss = table.mean(table.tokens["nll"])
    assert set(np.flatnonzero(choice.keep)) == {*np.argsort(-loss[:40])[:10], *(40 + np.argsort(-loss[40:])[:5])}
    assert choice.threshold is None
    np.testing.assert_allclose(choice.value, loss)


def test_one_stratum_is_no_stratum():
    table, method = random_table(30), build_samples("q_tuning", {})
    whole, one = method.choose(table, 9), choose_stratified(method, table, 9, np.full(30, "a", dtype=object))
    for column in ("keep", "value", "reason", "prunable"):
        assert getattr(whole, column).tolist() == getattr(one, column).tolist()
    assert whole.threshold == one.threshold


@pytest.mark.parametrize(("minimum", "small"), [(0, 1), (1, 1), (3, 3), (50, 10), (0.1, 6), (0.04, 3), (0.5, 10)])
def test_a_minimum_is_a_number_or_a_fraction_of_what_is_kept(minimum, small):
    strata = sources(large=990, small=10)
    choice = choose_stratified(build_samples("random", {}), random_table(1000), 60, strata, minimum)
    assert per_stratum(choice, strata) == {"large": 60 - small, "small": small}


def test_minimums_that_do_not_fit_are_refused():
    strata = sources(a=10, b=10, c=10)
    with pytest.raises(DataError, match="12 rows, but only 11"):
        choose_stratified(build_samples("random", {}), random_table(30), 11, strata, 4)


def test_what_one_stratum_cannot_give_goes_to_the_others():
    table = random_table(40, nll=1.0)
    tokens = dict(table.tokens)
    tokens["nll"] = np.where(table.row_of_token < 18, np.nan, tokens["nll"])
    spoilt = type(table)(table.ids, table.offsets, table.rows, tokens, table.facts)
    strata = sources(a=20, b=20)
    choice = choose_stratified(build_samples("loss", {}), spoilt, 16, strata)
    assert per_stratum(choice, strata) == {"a": 2, "b": 14}


def test_rows_without_targets_do_not_count_in_proportions():
    table = random_table(40, targets=[0] * 15 + [3] * 25)
    strata = sources(a=20, b=20)
    choice = choose_stratified(build_samples("random", {}), table, 10, strata)
    assert per_stratum(choice, strata) == {"a": 2, "b": 8}
    assert choose_stratified(build_samples("random", {}), table, 100, strata).keep.sum() == 25
    assert not choose_stratified(build_samples("random", {}), table, 0, strata).keep.any()


def test_repeats_are_found_across_strata():
    table, strata = filled(1.5, 12), sources(a=6, b=6)
    for name in ("exact_duplicates", "near_duplicates", "semantic_duplicates"):
        choice = choose_stratified(build_samples(name, {}), table, 12, strata)
        assert choice.keep.sum() == 1
        assert (choice.other != "").sum() == 11
        assert choice.threshold is not None


@pytest.mark.parametrize("name", ["exact_duplicates", "near_duplicates", "semantic_duplicates"])
def test_what_is_left_without_repeats_is_shared_out(name):
    method, table, strata = build_samples(name, {}), random_table(60), sources(a=40, b=20)
    choice = choose_stratified(method, table, 15, strata)
    assert per_stratum(choice, strata) == {"a": 10, "b": 5}
    assert set(choice.reason) == {"unique", "not_drawn"}
    assert (choice.reason == "unique").tolist() == choice.keep.tolist()
    # With one stratum the same rows as without any.
    one = choose_stratified(method, table, 15, np.full(60, "", dtype=object))
    assert one.keep.tolist() == method.choose(table, 15).keep.tolist()


def test_prunable_rows_come_through():
    strata = sources(a=6, b=6)
    tuned = choose_stratified(build_samples("q_tuning", {}), random_table(12), 6, strata)
    assert tuned.keep.sum() == 6
    assert not (tuned.prunable & ~tuned.keep).any()


def test_the_order_of_rows_changes_nothing():
    table = random_table(50)
    order = np.random.default_rng(1).permutation(50)
    for name in ("random", "q_tuning", "diversity"):
        method = build_samples(name, {})
        straight = choose_stratified(method, table, 20, make_strata(table, ["source"]))
        shuffled = choose_stratified(method, table.pick(order), 20, make_strata(table.pick(order), ["source"]))
        assert straight.keep[order].tolist() == shuffled.keep.tolist()


def test_no_rows_at_all():
    table = random_table(3).pick(np.zeros(0, dtype=np.int64))
    choice = choose_stratified(build_samples("loss", {}), table, 5, make_strata(table, ["source", "length"]))
    assert len(choice.keep) == 0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6), st.integers(0, 300))
def test_parts_are_exact_and_inside_their_bounds(strata, count):
    size = np.array([size for size, _ in strata])
    least = np.array([min(size, least) for size, least in strata])
    count = max(count, int(least.sum()))
    parts = split_count(count, size, least, size)
    assert parts.sum() == min(count, size.sum())
    assert (parts >= least).all()
    assert (parts <= size).all()


def test_parts_with_room_for_all_are_within_one_of_their_share():
    size = np.array([17, 29, 3, 51])
    parts = split_count(37, size, np.zeros(4, dtype=int), size)
    assert np.abs(parts - 37 * size / 100).max() < 1
