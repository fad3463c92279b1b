"""DEALRec: the joined score, the hardest rows, and how the bins share the count."""

from __future__ import annotations

import numpy as np
import pytest

from prunetune.methods.samples import build_samples, minmax
from prunetune.model.score_table import ScoreTable
from tests.methods.samples.tables import random_table


def test_the_score_joins_both_after_minmax():
    table = random_table(20)
    found = build_samples("effort_influence", {"effort_weight": 0.3}).scores(table)
    expected = minmax(table.rows["influence"]) + 0.3 * minmax(table.rows["grad_norm"])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_without_influence_effort_stands_alone():
    table = random_table(20)
    rows = {key: column for key, column in table.rows.items() if key != "influence"}
    alone = ScoreTable(table.ids, table.offsets, rows, table.tokens)
    np.testing.assert_allclose(
        build_samples("effort_influence", {}).scores(alone), minmax(table.rows["grad_norm"]), rtol=1e-6
    )


def test_small_bins_are_taken_whole_and_large_ones_share_the_rest():
    # Three bins of 2, 5 and 33 rows; 12 wanted: 2 of the first (4 would be its share), 5 of 10/2, 5 of the last.
    effort = np.concatenate([np.full(2, 0.0), np.full(5, 1.5), np.full(33, 3.0)])
    table = random_table(40, grad_norm=effort, influence=0.0)
    choice = build_samples("effort_influence", {"bins": 3, "drop_hardest": 0}).choose(table, 12)
    assert [int(choice.keep[effort == value].sum()) for value in (0.0, 1.5, 3.0)] == [2, 5, 5]
    choice = build_samples("effort_influence", {"bins": 3, "drop_hardest": 0}).choose(table, 20)
    assert [int(choice.keep[effort == value].sum()) for value in (0.0, 1.5, 3.0)] == [2, 5, 13]


def test_the_hardest_are_left_out_unless_they_are_needed():
    effort = np.arange(40.0)
    table = random_table(40, grad_norm=effort, influence=0.0)
    choice = build_samples("effort_influence", {}).choose(table, 10)
    assert np.flatnonzero(choice.reason == "hardest").tolist() == [36, 37, 38, 39]
    choice = build_samples("effort_influence", {}).choose(table, 38)
    assert np.flatnonzero(choice.reason == "hardest").tolist() == [38, 39]
    assert choice.keep.sum() == 38


@pytest.mark.parametrize("bins", [1, 3, 50, 1000])
def test_the_count_is_exact_for_any_bins(bins):
    for seed in range(3):
        table = random_table(57, seed=seed)
        method = build_samples("effort_influence", {"bins": bins}, seed)
        for count in range(0, 58, 3):
            assert method.choose(table, count).keep.sum() == count


def test_the_draw_is_by_seed():
    table = random_table(60)
    kept = [build_samples("effort_influence", {}, seed).choose(table, 20).keep.tolist() for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
