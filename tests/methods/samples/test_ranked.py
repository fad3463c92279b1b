"""Methods that rank by one number: the number itself, directions, limits, what the audit is told."""

from __future__ import annotations

import math

import numpy as np
import pytest

from prunetune.core.errors import ConfigError
from prunetune.methods.samples import build_samples
from prunetune.methods.samples._ranked import perplexity
from tests.methods.samples.tables import means_table, random_table


def kept(name, table, count, seed=0, **options):
    return np.flatnonzero(build_samples(name, options, seed).choose(table, count).keep).tolist()


def by_hand(table, column):
    """Means over each row's tokens, the slow way."""
    values = table.tokens[column].astype(np.float64)
    return np.array([values[a:b].mean() for a, b in zip(table.offsets[:-1], table.offsets[1:], strict=True)])


@pytest.mark.parametrize(
    ("name", "column", "highest", "lowest"),
    [
        ("entropy", "entropy", {"order": "highest"}, {"order": "lowest"}),
        ("loss", "nll", {"order": "highest"}, {"order": "lowest"}),
        ("perplexity", "nll", {"band": "high"}, {"band": "low"}),
        ("el2n", "el2n", {}, None),
    ],
)
def test_means_over_targets_decide(name, column, highest, lowest):
    table = random_table(30)
    order = np.argsort(by_hand(table, column))
    assert kept(name, table, 5, **highest) == sorted(order[-5:].tolist())
    if lowest:
        assert kept(name, table, 5, **lowest) == sorted(order[:5].tolist())


@pytest.mark.parametrize(("name", "column"), [("last_layer_gradient", "grad_norm"), ("less", "influence")])
def test_the_largest_of_a_row_column_are_kept(name, column):
    table = random_table(30)
    assert kept(name, table, 5) == sorted(np.argsort(table.rows[column])[-5:].tolist())


def test_longest_shortest_and_the_middle_by_target_tokens():
    table = random_table(9, targets=[3, 9, 1, 7, 5, 8, 2, 6, 4])
    assert kept("length", table, 2) == [1, 5]
    assert kept("length", table, 2, order="shortest") == [2, 6]
    assert kept("length", table, 3, order="band") == [4, 7, 8]
    # Between a half and all of them the middle is 7, then 6 and 8.
    assert kept("length", table, 3, order="band", lower=0.5) == [3, 5, 7]


def test_the_middle_of_the_perplexities():
    table = means_table(nll=np.array([0.1, 5.0, 2.0, 1.0, 3.0, 0.5, 4.0]))
    assert kept("perplexity", table, 3) == [2, 3, 4]
    assert kept("perplexity", table, 1) == [2]


def test_limits_leave_out_exact_shares_of_both_ends():
    table = means_table(nll=np.arange(10) / 2)
    choice = build_samples("loss", {"lower": 0.2, "upper": 0.7}).choose(table, 10)
    assert np.flatnonzero(choice.keep).tolist() == [2, 3, 4, 5, 6]
    assert set(choice.reason[~choice.keep]) == {"filtered"}
    assert kept("el2n", means_table(el2n=np.arange(10) / 10), 3, drop_top=0.2) == [5, 6, 7]
    # In floating point 0.57 * 100 is below 57 and 0.07 * 100 above 7.
    hundred = means_table(nll=np.arange(100) / 30)
    assert kept("loss", hundred, 100, lower=0.57) == list(range(57, 100))
    assert kept("loss", hundred, 100, upper=0.07) == list(range(7))


def test_limits_of_equal_values_leave_out_as_many():
    assert len(kept("last_layer_gradient", random_table(10, grad_norm=1.0), 10, drop_top=0.3)) == 7


def test_lower_must_be_below_upper():
    with pytest.raises(ConfigError, match="set lower below upper"):
        build_samples("loss", {"lower": 0.5, "upper": 0.5})


def test_the_audit_hears_natural_values():
    table = means_table(nll=np.array([1.0, 2.0, 3.0, 1e30]))
    choice = build_samples("perplexity", {"band": "low"}).choose(table, 2)
    np.testing.assert_allclose(choice.value, [math.e, math.exp(2), math.exp(3), math.exp(20)])
    assert choice.threshold == pytest.approx(math.exp(2))
    choice = build_samples("loss", {"order": "lowest"}).choose(table, 2)
    assert choice.threshold == pytest.approx(2.0)
    assert choice.value[3] == 1e30
    assert build_samples("perplexity", {}).choose(table, 2).threshold is None


def test_perplexity_is_capped_and_leaves_what_is_no_number():
    found = perplexity(np.array([0.0, 20.0, 21.0, np.nan, np.inf]))
    np.testing.assert_allclose(found, [1.0, math.exp(20), math.exp(20), np.nan, np.inf])


def test_noise_below_five_digits_does_not_decide():
    table = random_table(20, grad_norm=1.0)
    wiggled = random_table(20, grad_norm=1.0 + 1e-7 * np.random.default_rng(0).normal(size=20))
    assert kept("last_layer_gradient", table, 7) == kept("last_layer_gradient", wiggled, 7)


def test_lots_depend_on_seed_and_id_alone():
    table = random_table(200)
    first = kept("random", table, 50)
    assert kept("random", table, 50) == first
    assert kept("random", table, 50, seed=1) != first
    # More rows: those of before stay. Fewer candidates: the others move up.
    assert set(first) < set(kept("random", table, 80))
    half = table.pick(np.arange(100))
    assert {half.ids[row] for row in kept("random", half, 50)} >= {table.ids[row] for row in first if row < 100}


def test_lots_are_fair():
    table = random_table(40)
    often = np.zeros(40)
    for seed in range(200):
        often[kept("random", table, 10, seed=seed)] += 1
    # Binomial: 50 expected, standard deviation 6.1.
    assert 25 < often.min() <= often.max() < 75
