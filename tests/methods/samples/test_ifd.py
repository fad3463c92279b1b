"""IFD: both published ratios, and who is discarded."""

from __future__ import annotations

import numpy as np
import pytest

from prunetune.methods.samples import build_samples
from tests.methods.samples.tables import means_table, random_table

GIVEN = np.array([1.0, 2.0, 3.0, 0.5, 2.5])
ALONE = np.array([2.0, 2.5, 2.0, 3.0, 2.5])


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("loss_ratio", [0.5, 0.8, 1.5, 1 / 6, 1.0]),
        ("perplexity_ratio", np.exp([-1.0, -0.5, 1.0, -2.5, 0.0])),
    ],
)
def test_both_ratios(variant, expected):
    method = build_samples("ifd", {"variant": variant})
    np.testing.assert_allclose(method.scores(means_table(nll=GIVEN, direct_nll=ALONE)), expected)


def test_the_highest_below_one_are_kept():
    table = means_table(nll=GIVEN, direct_nll=ALONE)
    choice = build_samples("ifd", {}).choose(table, 2)
    assert choice.keep.tolist() == [True, True, False, False, False]
    assert choice.reason.tolist() == ["top", "top", "unaided", "below", "unaided"]
    assert build_samples("ifd", {}).choose(table, 5).keep.sum() == 3
    kept = build_samples("ifd", {"discard_unaided": False}).choose(table, 2).keep
    assert np.flatnonzero(kept).tolist() == [2, 4]


def test_cut_answers_are_discarded_whatever_their_ratio():
    truncated = np.array([True, False, True, False, False])
    choice = build_samples("ifd", {}).choose(means_table(nll=GIVEN, direct_nll=ALONE, truncated=truncated), 5)
    assert choice.reason.tolist() == ["truncated", "top", "truncated", "top", "unaided"]


@pytest.mark.parametrize("variant", ["loss_ratio", "perplexity_ratio"])
def test_what_cannot_be_measured_is_a_bad_score(variant):
    direct = np.array([np.nan, np.inf, 3.0, 3.0])
    nll = np.array([1.0, 1.0, np.nan, np.inf])
    choice = build_samples("ifd", {"variant": variant}).choose(means_table(nll=nll, direct_nll=direct), 4)
    assert choice.reason.tolist() == ["bad_score"] * 4


def test_an_empty_answer_has_no_target():
    table = random_table(2, targets=[0, 3], direct_nll=np.array([np.nan, 9.0]))
    assert build_samples("ifd", {}).choose(table, 2).reason.tolist() == ["no_target", "top"]
