"""Rounding, tie-breaks and ranks that sample and token methods share."""

from __future__ import annotations

import numpy as np
import pytest

from prunetune.methods.ranking import best_first, name_ranks, percentiles, rank_correlation, significant


def test_five_significant_digits_at_every_size():
    rng = np.random.default_rng(0)
    values = rng.normal(size=3000) * 10.0 ** rng.integers(-280, 300, 3000)
    edges = np.concatenate([10.0 ** np.arange(-280, 300, 7), [0.0, 0.5, 9.99999, 99999.5, -123456.0, 1.7e308]])
    for found, value in zip(significant(np.concatenate([values, edges])), [*values, *edges]):
        assert found == pytest.approx(float(f"{value:.4e}"), rel=1e-14)


def test_noise_of_the_last_bits_does_not_decide():
    scores = np.full(8, 0.7231)
    noisy = scores * (1 + 1e-7 * np.arange(8))
    assert best_first(noisy, np.arange(8)).tolist() == list(range(8))


def test_what_is_not_finite_ranks_last_and_ties_go_to_the_smaller_name():
    scores = np.array([np.nan, 1.0, np.inf, 1.0, 2.0, -np.inf])
    ties = name_ranks(["a", "z", "b", "c", "d", "e"])
    assert best_first(scores, ties).tolist() == [4, 3, 1, 0, 2, 5]


def test_percentiles_share_places_and_skip_what_is_not_finite():
    found = percentiles(np.array([5.0, 1.0, np.nan, 5.0, 9.0]))
    assert found[[0, 1, 3, 4]].tolist() == [0.5, 0.125, 0.5, 0.875]
    assert np.isnan(found[2])
    assert percentiles(np.zeros(0)).tolist() == []


def test_rank_correlation():
    values = np.array([1.0, 2, 3, 4, np.nan])
    assert rank_correlation(values, np.exp(values)) == pytest.approx(1.0)
    assert rank_correlation(values, -values) == pytest.approx(-1.0)
    assert rank_correlation(values, np.ones(5)) is None
    assert rank_correlation(values[:2], values[:2]) is None
