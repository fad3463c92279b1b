"""The formula of each token method, on numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from prunetune.core.errors import ConfigError
from prunetune.methods.tokens import build_tokens, choose_tokens
from prunetune.model.score_table import ScoreTable


def table(*rows, **columns) -> ScoreTable:
    """Rows of losses; positions follow each other unless given."""
    counts = [len(row) for row in rows]
    tokens = {
        "nll": np.concatenate(rows).astype(np.float64),
        "position": np.concatenate([np.arange(n) for n in counts]),
        **{key: np.asarray(values) for key, values in columns.items()},
    }
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return ScoreTable([f"r{i}" for i in range(len(rows))], offsets, {}, tokens)


def scores(name, given, seed=0, **options):
    return build_tokens(name, options, seed).scores(given)


def kept(name, given, fraction, scope="sample", **options):
    keep = choose_tokens(build_tokens(name, options), given, fraction, scope=scope, floor=0.0)
    return np.flatnonzero(keep).tolist()


def test_random_is_a_function_of_seed_and_id():
    given = table([1.0] * 6, [1.0] * 6)
    first = scores("random", given)
    assert len(set(first)) == 12
    np.testing.assert_array_equal(scores("random", given.pick(np.array([1]))), first[6:])
    assert (scores("random", given, seed=1) != first).all()


def test_loss_bands():
    given = table([5.0, 1.0, 3.0, 2.0, 4.0], [50.0, 10.0, 30.0, 20.0, 40.0])
    assert kept("loss", given, 0.4) == [1, 3, 6, 8]
    assert kept("loss", given, 0.4, band="high") == [0, 4, 5, 9]
    assert kept("loss", given, 0.2, band="mid") == [2, 7]
    # Percentiles of each sample treat both alike; percentiles of all prefer the border between the two.
    assert kept("loss", given, 0.2, "all", band="mid") == [2, 7]
    assert kept("loss", given, 0.2, "all", band="mid", percentiles_of="all") == [0, 6]


def test_excess_loss_keeps_what_only_the_reference_knows():
    # Known to both, known to the reference only, known to neither, known to the model only.
    given = table([0.1, 4.0, 6.0, 0.2], reference_nll=[0.1, 0.5, 6.0, 3.0])
    np.testing.assert_allclose(scores("excess_loss", given), [0.0, 3.5, 0.0, -2.8])
    assert kept("excess_loss", given, 0.25) == [1]


def test_token_cleaning_keeps_what_tuning_made_likelier():
    base, tuned = [2.0, 2.0, 2.0], [0.5, 1.9, 3.0]
    given = table(base, reference_nll=tuned)
    np.testing.assert_allclose(scores("token_cleaning", given), [1.5, 0.1, -1.0])
    assert kept("token_cleaning", given, 0.34) == [0, 1]


def test_neighbour_perplexity_sums_both_neighbours():
    given = table(np.log([2.0, 3.0, 5.0]), np.log([7.0, 11.0]))
    np.testing.assert_allclose(-scores("neighbour_perplexity", given), [1 + 1.5, 1.5 + 3.5, 2.5 + 1.5, 9.0, 9.0])
    np.testing.assert_allclose(
        -scores("neighbour_perplexity", given, combine="average"),
        [1 + 1.25, 1.5 + 1.75, 2.5 + 2.0, 3.5 + 4.5, 5.5 + 4.5],
    )
    np.testing.assert_allclose(-scores("neighbour_perplexity", given, neighbour_weight=0), [2, 3, 5, 7, 11])
    np.testing.assert_allclose(-scores("neighbour_perplexity", given, neighbour_weight=1), [3, 7, 3, 11, 7])


def test_neighbour_perplexity_drops_the_surprising_among_surprising_ones():
    given = table(np.log([9.0, 1.0, 1.0, 8.0, 8.0, 8.0, 1.0]))
    assert kept("neighbour_perplexity", given, 6 / 7) == [0, 1, 2, 3, 5, 6]


def test_neighbour_perplexity_does_not_reach_over_a_gap_or_another_row():
    given = table(np.log([2.0, 3.0]), position=[4, 9])
    np.testing.assert_allclose(-scores("neighbour_perplexity", given), [1.0, 1.5])


def test_neighbour_perplexity_survives_huge_losses():
    assert np.isfinite(scores("neighbour_perplexity", table([1e30, 800.0, 1.0]))).all()


def test_probability_and_entropy_go_both_ways():
    given = table([0.1, 3.0, 1.0], entropy=[0.5, 0.1, 2.0])
    np.testing.assert_allclose(scores("probability", given), np.exp([-0.1, -3.0, -1.0]))
    assert kept("probability", given, 0.3) == [0]
    assert kept("probability", given, 0.3, keep="low") == [1]
    assert kept("entropy", given, 0.3) == [2]
    assert kept("entropy", given, 0.3, keep="low") == [1]


def test_paragraphs_leave_whole_least_surprising_first():
    #           0          1               2          3 (last)
    nll = [4.0, 0, 0, 1.0, 9, 9, 9, 2.0, 0, 0, 0.1, 0]
    given = table(nll, paragraph=[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3])
    # A later token's loss does not count, and the last paragraph stays though its first token is the least surprising.
    assert kept("paragraph_surprisal", given, 0.75) == [0, 1, 2, 7, 8, 9, 10, 11]
    assert kept("paragraph_surprisal", given, 0.5) == [0, 1, 2, 10, 11]
    assert kept("paragraph_surprisal", given, 0.1) == [10, 11]


def test_paragraphs_of_all_rows_compete_for_a_common_budget():
    given = table([1.0, 0, 5.0, 0], [2.0, 0, 5.0, 0], [0.5, 0, 9.0, 0], paragraph=[0, 0, 1, 1] * 3)
    assert kept("paragraph_surprisal", given, 10 / 12, "all") == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]
    assert kept("paragraph_surprisal", given, 8 / 12, "all") == [2, 3, 4, 5, 6, 7, 10, 11]


def test_a_paragraph_with_a_protected_token_stays_and_one_below_the_floor_is_passed_over():
    given = table([1.0, 0, 2.0, 0, 3.0, 0], paragraph=[0, 0, 1, 1, 2, 2], protected=[False, True, *[False] * 4])
    assert kept("paragraph_surprisal", given, 0.5) == [0, 1, 4, 5]
    large_first = table([1.0, *[0] * 7, 2.0, 0], paragraph=[0] * 8 + [1] * 2)
    keep = choose_tokens(build_tokens("paragraph_surprisal", {}), large_first, 0.5, floor=0.4)
    assert keep.all()


@pytest.mark.parametrize(
    ("name", "options"),
    [("loss", {"band": "middle"}), ("neighbour_perplexity", {"neighbour_weight": 1.5}), ("entropy", {"keep": "top"})],
)
def test_bad_values_of_options_are_refused(name, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build_tokens(name, options)
