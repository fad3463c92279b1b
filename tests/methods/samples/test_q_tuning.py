"""Q-Tuning: quadrants, the bisection's reach, the top-up and the trim, what is prunable."""

from __future__ import annotations

import numpy as np
import pytest

from prunetune.methods.samples import build_samples, minmax
from prunetune.methods.samples._quadrants import find_quadrants
from tests.methods.samples.tables import means_table, random_table

# Four clear corners and four rows in the middle; perplexity is e^nll.
NLL = np.log([8.0, 8.5, 1.0, 1.1, 4.0, 4.1, 4.2, 4.3])
ENTROPY = np.array([3.0, 0.1, 0.2, 3.1, 1.5, 1.6, 1.7, 1.4])


def choose(count, nll=NLL, entropy=ENTROPY, **options):
    return build_samples("q_tuning", options).choose(means_table(nll=nll, entropy=entropy), count)


def test_the_four_corners():
    choice = choose(2)
    assert choice.reason.tolist() == ["Q1", "Q2", "Q3", "Q4", "middle", "middle", "middle", "middle"]
    assert np.flatnonzero(choice.keep).tolist() == [1, 3]
    assert np.flatnonzero(choice.prunable).tolist() == [1]


def test_the_value_is_normalised_perplexity_minus_normalised_entropy():
    expected = minmax(np.exp(NLL)) - minmax(ENTROPY)
    np.testing.assert_allclose(choose(2).value, expected, atol=2e-5)
    scores = build_samples("q_tuning", {}).scores(means_table(nll=NLL, entropy=ENTROPY))
    np.testing.assert_allclose(scores, np.abs(expected), atol=2e-5)


def test_thresholds_are_interpolated_quantiles():
    error, uncertainty = np.arange(11.0), np.arange(11.0)[::-1] * 2
    found = find_quadrants(error, uncertainty, 0.5, tolerance=1e-9, steps=1, best=False)
    # The first guess is the middle of 0 and 0.49.
    assert found.error == pytest.approx((2.45, 7.55))
    assert found.uncertainty == pytest.approx((4.9, 15.1))
    assert found.names.tolist() == ["Q4"] * 3 + ["middle"] * 5 + ["Q2"] * 3


# Fraction reached by bisection alone, from independent simulations of log-normal perplexities and entropies that
# rise with them (Gaussian copula), for wanted fractions of 1/8, 1/4 and 1/2.
REACHED = {
    (0.0, 32): (0.13, 0.26, 0.46),
    (0.6, 32): (0.13, 0.23, 0.30),
    (0.8, 32): (0.12, 0.19, 0.20),
    (0.9, 32): (0.11, 0.15, 0.14),
    (0.0, 256): (0.13, 0.25, 0.47),
    (0.6, 256): (0.13, 0.25, 0.27),
    (0.8, 256): (0.12, 0.19, 0.19),
    (0.9, 256): (0.12, 0.13, 0.12),
    (0.0, 8): (0.12, 0.22, 0.42),
    (0.9, 8): (0.02, 0.14, 0.16),
}


@pytest.mark.parametrize(("rho", "rows"), REACHED)
def test_how_far_the_published_bisection_reaches(rho, rows):
    draw = np.random.default_rng(1)
    for share, expected in zip((0.125, 0.25, 0.5), REACHED[rho, rows], strict=True):
        reached = []
        for _ in range(max(12, 1200 // rows)):
            normal = draw.normal(size=rows)
            entropy = rho * normal + np.sqrt(1 - rho**2) * draw.normal(size=rows)
            found = find_quadrants(np.exp(normal), entropy, share, tolerance=0.01, steps=10, best=False)
            reached.append(found.wanted.mean())
        assert np.mean(reached) == pytest.approx(expected, abs=0.04)


def test_half_of_the_rows_are_never_in_the_quadrants():
    draw = np.random.default_rng(0)
    found = find_quadrants(draw.random(2000), draw.random(2000), 1.0, tolerance=0.01, steps=30, best=True)
    assert found.wanted.mean() == pytest.approx(2 * 0.49**2, abs=0.03)


def test_the_best_cut_is_at_least_as_near_as_the_last():
    draw = np.random.default_rng(0)
    for rows in (8, 20, 50):
        for _ in range(20):
            error = draw.normal(size=rows)
            uncertainty = 0.7 * error + 0.7 * draw.normal(size=rows)
            for share in (0.125, 0.25, 0.5):
                last, best = (
                    find_quadrants(error, uncertainty, share, tolerance=1e-6, steps=10, best=best).wanted.mean()
                    for best in (False, True)
                )
                assert abs(best - share) <= abs(last - share) + 1e-12


def test_the_top_up_takes_the_largest_differences_and_counts_them_by_sign():
    table = random_table(64, seed=1)
    method = build_samples("q_tuning", {})
    choice = method.choose(table, 48)
    topped = choice.reason == "topup"
    assert topped.sum() > 10
    assert choice.keep.sum() == 48
    rest = ~choice.keep
    assert np.abs(choice.value[topped]).min() >= np.abs(choice.value[rest]).max() - 1e-4
    assert (choice.prunable[topped] == (choice.value[topped] >= 0)).all()
    assert choice.prunable[choice.reason == "Q2"].all()
    assert not choice.prunable[choice.reason == "Q4"].any()
    assert not choice.prunable[rest].any()


def test_too_many_are_trimmed_by_the_smallest_differences_but_not_as_published():
    # Five equal rows in each wanted corner, which can only be inside together; ten in the middle.
    nll = np.concatenate([np.full(5, 3.0), np.full(5, 1.0), np.linspace(1.5, 2.5, 10)])
    entropy = np.concatenate([np.full(5, 1.0), np.full(5, 3.0), np.linspace(1.5, 2.5, 10)])
    exact, published = (choose(8, nll, entropy, mode=mode, tolerance=0.15) for mode in ("exact", "published"))
    assert exact.keep.sum() == 8
    assert (exact.reason == "trimmed").sum() == 2
    assert published.keep.tolist() == [True] * 10 + [False] * 10
    assert set(published.reason[published.keep]) <= {"Q2", "Q4"}
    assert "trimmed" not in published.reason


def test_of_the_wanted_quadrants_the_smallest_differences_are_trimmed():
    trims = 0
    for seed in range(20):
        choice = build_samples("q_tuning", {"tolerance": 0.3}).choose(random_table(40, seed=seed), 5)
        trimmed = choice.reason == "trimmed"
        trims += trimmed.any()
        assert np.abs(choice.value[choice.keep]).min() >= np.abs(choice.value[trimmed]).max(initial=0.0) - 1e-4
    assert trims > 5


def test_no_row_of_a_wanted_quadrant_is_given_up_for_a_topped_up_one():
    for seed in range(10):
        draw = np.random.default_rng(seed)
        nll = draw.normal(2.0, 0.5, 40)
        reasons = set(choose(16, nll, 0.8 * nll + draw.normal(1.0, 0.3, 40)).reason)
        assert "topup" in reasons
        assert "trimmed" not in reasons


def test_published_returns_the_last_cut_and_exact_the_best():
    differ = 0
    for seed in range(10):
        table = random_table(30, seed=seed)
        cuts = {}
        for mode in ("exact", "published"):
            method = build_samples("q_tuning", {"mode": mode})
            cuts[mode] = method.quadrants(table, 9).names.tolist()
            error, uncertainty = method.axes(table)
            expected = find_quadrants(error, uncertainty, 0.3, tolerance=0.01, steps=10, best=mode == "exact")
            assert cuts[mode] == expected.names.tolist()
        differ += cuts["exact"] != cuts["published"]
    assert differ > 0


def test_equal_rows_are_all_known_and_sure():
    choice = choose(3, np.full(8, 1.0), np.full(8, 1.0))
    assert sorted(choice.reason) == ["Q3"] * 5 + ["topup"] * 3
    assert choice.prunable.sum() == 3


def test_published_tops_up_too():
    table = random_table(32, seed=2)
    assert build_samples("q_tuning", {"mode": "published"}).choose(table, 24).keep.sum() >= 24
    assert not build_samples("q_tuning", {"mode": "published"}).choose(table, 0).keep.any()


def test_one_outlier_spoils_minmax_but_not_ranks():
    nll = np.append(np.linspace(0.5, 1.5, 29), 19.0)
    entropy = np.append(np.random.default_rng(0).permutation(np.linspace(1, 2, 29)), 1.5)
    spoilt, ranked = choose(20, nll, entropy), choose(20, nll, entropy, normalise="rank")
    assert spoilt.keep.sum() == ranked.keep.sum() == 20
    # With minmax the perplexities of all other rows are one number: what is left is the entropy alone.
    np.testing.assert_allclose(spoilt.value[:29], -minmax(entropy)[:29], atol=1e-4)
    assert ranked.value[:29].max() > 0.3


def test_a_mean_loss_above_twenty_nats_counts_as_twenty():
    nll = np.array([1.0, 2.0, 20.0, 1e30])
    choice = choose(2, nll, np.array([1.0, 2.0, 1.5, 1.5]))
    assert choice.value[2] == pytest.approx(choice.value[3])
    assert np.isfinite(choice.value).all()


@pytest.mark.parametrize("normalise", ["minmax", "rank"])
@pytest.mark.parametrize("mode", ["exact", "published"])
def test_empty_quadrants_are_filled_by_the_top_up(mode, normalise):
    # Perplexity and entropy rise together: everything is noise or known, Q2 and Q4 are empty.
    values = np.linspace(0.1, 3, 16)
    choice = choose(4, values, values, mode=mode, normalise=normalise)
    assert choice.keep.sum() == 4
    assert set(choice.reason[choice.keep]) == {"topup"}
    assert set(choice.reason[~choice.keep]) <= {"Q1", "Q3", "middle"}


def test_two_rows_and_one():
    assert choose(1, NLL[:2], ENTROPY[:2]).keep.sum() == 1
    assert choose(1, NLL[:1], ENTROPY[:1]).keep.tolist() == [True]
