"""DONOD: the closed form against steps that are really taken, and TOPSIS against a calculation by hand."""

from __future__ import annotations

import numpy as np
import pytest

from prunetune.core.errors import ConfigError, DataError
from prunetune.methods.samples import build_samples
from prunetune.methods.samples.donod import topsis
from prunetune.model.score_table import ScoreTable
from tests.methods.samples.tables import random_table


def stepped(rows: int = 6, hidden: int = 5, vocabulary: int = 11, eta: float = 0.1, seed: int = 0):
    """A table as scoring fills it, and both quantities from a step of SGD on the output layer, row by row."""
    draw = np.random.default_rng(seed)
    weight_VD = draw.normal(size=(vocabulary, hidden))
    targets = draw.integers(1, 7, rows)
    residual, norm, don, nod = [], [], [], []
    for length in targets:
        hidden_TD, target_T = draw.normal(size=(length, hidden)), draw.integers(0, vocabulary, length)
        logits_TV = hidden_TD @ weight_VD.T
        p_TV = np.exp(logits_TV - logits_TV.max(axis=1, keepdims=True))
        p_TV /= p_TV.sum(axis=1, keepdims=True)
        gradient_VD = (p_TV - np.eye(vocabulary)[target_T]).T @ hidden_TD / length
        after_VD = weight_VD - eta * gradient_VD
        residual.append((p_TV * logits_TV).sum(axis=1).mean() - logits_TV[np.arange(length), target_T].mean())
        norm.append(np.linalg.norm(gradient_VD))
        don.append(np.linalg.norm(after_VD) - np.linalg.norm(weight_VD))
        nod.append(np.linalg.norm(after_VD - weight_VD))
    table = random_table(rows, targets=targets.tolist(), residual=np.array(residual), grad_norm=np.array(norm))
    facts = {"weight_norm": float(np.linalg.norm(weight_VD))}
    return ScoreTable(table.ids, table.offsets, table.rows, table.tokens, facts), np.array(don), np.array(nod)


@pytest.mark.parametrize("eta", [1e-4, 0.1, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_closed_form_is_a_real_step_of_sgd(eta, seed):
    table, don, nod = stepped(eta=eta, seed=seed)
    found_don, found_nod = build_samples("donod", {"eta": eta}).deltas(table)
    np.testing.assert_allclose(found_don, don, rtol=1e-8, atol=1e-13)
    np.testing.assert_allclose(found_nod, nod, rtol=1e-9)
    assert np.abs(don).min() > 1e-8


def test_tiny_steps_do_not_cancel():
    """At 1e-12 the difference of two norms in float64 has lost most digits; the closed form has lost none."""
    table, _, _ = stepped()
    inner, weight_norm = table.rows["residual"], table.facts["weight_norm"]
    found, _ = build_samples("donod", {"eta": 1e-12}).deltas(table)
    np.testing.assert_allclose(found, -1e-12 * inner / weight_norm, rtol=1e-9)


def test_topsis_by_hand():
    # Columns of norm 5 and 13: (3, 4) / 5 and (12, 5) / 13, weights 1/4 and 3/4, the smallest first and largest second.
    matrix = np.array([[3.0, 12.0], [4.0, 5.0], [0.0, 0.0]])
    v = np.array([[0.15, 9 / 13], [0.2, 3.75 / 13], [0.0, 0.0]])
    best, worst = np.array([0.0, 9 / 13]), np.array([0.2, 0.0])
    to_best, to_worst = np.sqrt(((v - best) ** 2).sum(axis=1)), np.sqrt(((v - worst) ** 2).sum(axis=1))
    np.testing.assert_allclose(topsis(matrix, ("min", "max"), (1, 3)), to_worst / (to_best + to_worst))


def test_topsis_of_one_criterion_is_its_place_between_the_extremes():
    found = topsis(np.array([[1.0], [3.0], [2.0]]), ("min",))
    np.testing.assert_allclose(found, [1.0, 0.0, 0.5])
    np.testing.assert_allclose(topsis(np.array([[1.0], [3.0], [2.0]]), ("max",)), [0.0, 1.0, 0.5])


def test_topsis_of_equal_rows_and_of_none():
    assert topsis(np.full((3, 2), 7.0), ("min", "min")).tolist() == [0.5] * 3
    assert topsis(np.zeros((3, 2)), ("min", "max")).tolist() == [0.5] * 3
    assert topsis(np.zeros((0, 2)), ("min", "min")).tolist() == []


def test_directions_and_weights_are_obeyed():
    table, don, nod = stepped(rows=12)
    for options, best in [
        ({"weights": [1, 0]}, don.argmin()),
        ({"weights": [1, 0], "don_direction": "max"}, don.argmax()),
        ({"weights": [0, 1]}, nod.argmin()),
        ({"weights": [0, 1], "nod_direction": "max"}, nod.argmax()),
    ]:
        choice = build_samples("donod", {"eta": 0.1, **options}).choose(table, 1)
        assert np.flatnonzero(choice.keep).tolist() == [best]


def test_rows_that_cannot_be_judged_do_not_weigh_in():
    table, _, _ = stepped(rows=8)
    whole = build_samples("donod", {}).scores(table.pick(np.arange(7)))
    rows = {key: column.copy() for key, column in table.rows.items()}
    rows["grad_norm"][7] = np.nan
    spoilt = ScoreTable(table.ids, table.offsets, rows, table.tokens, table.facts)
    np.testing.assert_allclose(build_samples("donod", {}).scores(spoilt)[:7], whole)


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [1], ["inf", 1]])
def test_weights_that_cannot_be_used_are_refused(weights):
    with pytest.raises(ConfigError, match="weights"):
        build_samples("donod", {"weights": weights})


def test_the_norm_of_the_weight_must_be_known():
    table = random_table(4)
    with pytest.raises(DataError, match="weight_norm"):
        build_samples("donod", {}).choose(ScoreTable(table.ids, table.offsets, table.rows, table.tokens), 2)
