"""Semantic duplicates and diversity: against brute force on small sets of vectors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prunetune.methods.samples import build_samples
from prunetune.methods.samples._embeddings import unit_rows
from tests.methods.samples.tables import random_table

ALL = 10**6


def vectors_table(vectors):
    return random_table(len(vectors), embedding=np.asarray(vectors, dtype=np.float32))


def cosines(table, center=True):
    units = unit_rows(table, center)
    found = np.zeros((len(table), len(table)))
    found[np.ix_(units.rows, units.rows)] = units.similarity(slice(None), slice(None))
    return found


def planted(count=60, copies=15, noise=0.02, dimensions=16, seed=0):
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(count - copies, dimensions))
    near = vectors[:copies] + noise * draw.normal(size=(copies, dimensions))
    # All point one way, as the hidden states of a language model do.
    return vectors_table(10 + np.concatenate([vectors, near]))


def test_directions_are_of_norm_one_and_similarity_is_their_cosine():
    table = vectors_table(np.random.default_rng(0).normal(size=(20, 5)))
    units = unit_rows(table, center=False)
    assert [table.ids[row] for row in units.rows] == sorted(table.ids)
    plain = table.rows["embedding"][units.rows].astype(np.float64)
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(units.similarity(slice(None), slice(None)), plain @ plain.T, atol=1e-6)


def test_without_the_mean_direction_cosines_tell_rows_apart():
    table = planted(copies=0)
    above = cosines(table, center=False)[np.triu_indices(60, 1)]
    assert above.min() > 0.95
    assert np.abs(cosines(table)[np.triu_indices(60, 1)].mean()) < 0.1


def test_equal_embeddings_are_alike_with_and_without_the_mean():
    table = vectors_table(np.full((5, 4), 3.0))
    for center in (True, False):
        np.testing.assert_allclose(cosines(table, center), np.ones((5, 5)), atol=1e-6)


def test_one_enormous_embedding_leaves_the_others_where_they_are():
    vectors = np.random.default_rng(0).normal(size=(30, 6))
    vectors[7] *= 1e30
    wild = cosines(vectors_table(vectors))
    vectors[7] /= 1e30
    np.testing.assert_allclose(wild, cosines(vectors_table(vectors)), atol=1e-5)


@pytest.mark.parametrize("keep", ["hard", "easy", "first"])
def test_planted_semantic_duplicates_are_found(keep):
    table = planted()
    choice = build_samples("semantic_duplicates", {"keep": keep}).choose(table, ALL)
    pairs = {frozenset((table.ids[row], choice.other[row])) for row in np.flatnonzero(~choice.keep)}
    assert pairs == {frozenset((table.ids[row], table.ids[45 + row])) for row in range(15)}
    assert choice.threshold == pytest.approx(0.95)
    assert (choice.value[~choice.keep] > 0.95).all()


def test_without_centering_anisotropic_embeddings_are_all_duplicates():
    assert build_samples("semantic_duplicates", {"center": False}).choose(planted(), ALL).keep.sum() < 15


def test_inside_one_cluster_the_rule_is_that_of_the_paper():
    table = planted(noise=0.3)
    epsilon = 0.2
    options = {"clusters": 1, "keep": "first", "epsilon": epsilon}
    choice = build_samples("semantic_duplicates", options).choose(table, ALL)
    alike = cosines(table)
    order = np.argsort(np.array(table.ids))
    for place, row in enumerate(order):
        earlier = alike[row, order[:place]]
        assert choice.keep[row] == (not len(earlier) or earlier.max() <= 1 - epsilon)


def test_more_rows_than_one_block(monkeypatch):
    import prunetune.methods.samples.semantic_duplicates as module

    table = planted(noise=0.3)
    options = {"clusters": 1, "epsilon": 0.2}
    whole = build_samples("semantic_duplicates", options).choose(table, ALL)
    monkeypatch.setattr(module, "_BLOCK", 7)
    parts = build_samples("semantic_duplicates", options).choose(table, ALL)
    assert whole.keep.tolist() == parts.keep.tolist()
    assert whole.other.tolist() == parts.other.tolist()


def test_far_from_the_centre_or_near_it():
    # One cluster: of two rows that are alike the one farther from the mean direction stays, or the nearer.
    draw = np.random.default_rng(0)
    vectors = np.array([1.0, 0, 0]) + 0.01 * draw.normal(size=(8, 3))
    vectors = np.concatenate([vectors, [[1, 0.20, 0], [1, 0.25, 0]]])
    options = {"clusters": 1, "epsilon": 0.005, "center": False}
    hard = build_samples("semantic_duplicates", {**options, "keep": "hard"}).choose(vectors_table(vectors), ALL)
    easy = build_samples("semantic_duplicates", {**options, "keep": "easy"}).choose(vectors_table(vectors), ALL)
    assert hard.keep[8:].tolist() == [False, True]
    assert easy.keep[8:].tolist() == [True, False]


def greedy_k_center(alike, first, count):
    taken = [first]
    while len(taken) < count:
        distance = (1 - alike[:, taken]).min(axis=1)
        distance[taken] = -1
        taken.append(int(distance.argmax()))
    return taken


def greedy_facility(alike, count):
    taken = []
    while len(taken) < count:
        value = [
            (1 + alike[:, [*taken, row]]).max(axis=1).sum() if row not in taken else -1 for row in range(len(alike))
        ]
        taken.append(int(np.argmax(value)))
    return taken


def test_k_center_is_the_greedy_one():
    table = vectors_table(np.random.default_rng(1).normal(size=(40, 5)))
    units = unit_rows(table, True)
    first = int(units.rows[(units.directions @ units.directions.sum(axis=0)).argmax()])
    choice = build_samples("diversity", {"objective": "k_center"}).choose(table, 9)
    taken = greedy_k_center(cosines(table), first, 9)
    assert set(np.flatnonzero(choice.keep)) == set(taken)
    scores = build_samples("diversity", {"objective": "k_center"}).scores(table)
    assert np.argsort(-scores)[:9].tolist() == taken
    assert choice.threshold == pytest.approx((1 - cosines(table)[taken[-1], taken[:-1]]).min(), abs=1e-5)


@pytest.mark.parametrize("first", [1, 3, 64])
def test_lazy_facility_location_is_the_greedy_one(first, monkeypatch):
    monkeypatch.setattr("prunetune.methods.samples.diversity._FIRST_BATCH", first)
    table = vectors_table(np.random.default_rng(2).normal(size=(50, 4)))
    choice = build_samples("diversity", {}).choose(table, 8)
    taken = greedy_facility(cosines(table), 8)
    assert set(np.flatnonzero(choice.keep)) == set(taken)
    assert np.argsort(-build_samples("diversity", {}).scores(table))[:8].tolist() == taken


def test_facility_location_is_near_the_best_set_of_all():
    table = vectors_table(np.random.default_rng(3).normal(size=(14, 3)))
    alike = 1 + cosines(table)
    best = max(alike[:, list(rows)].max(axis=1).sum() for rows in itertools.combinations(range(14), 3))
    kept = build_samples("diversity", {}).choose(table, 3).keep
    assert alike[:, kept].max(axis=1).sum() >= (1 - 1 / np.e) * best


@pytest.mark.parametrize("objective", ["k_center", "facility_location"])
def test_every_cloud_is_visited_before_any_twice(objective):
    draw = np.random.default_rng(0)
    centres = np.linalg.qr(draw.normal(size=(8, 8)))[0]
    vectors = np.concatenate([centre + 0.01 * draw.normal(size=(6, 8)) for centre in centres])
    choice = build_samples("diversity", {"objective": objective, "center": False}).choose(vectors_table(vectors), 8)
    assert sorted(np.flatnonzero(choice.keep) // 6) == list(range(8))


@pytest.mark.parametrize("objective", ["k_center", "facility_location"])
def test_equal_embeddings_still_give_the_count(objective):
    choice = build_samples("diversity", {"objective": objective}).choose(vectors_table(np.ones((9, 3))), 4)
    assert np.flatnonzero(choice.keep).tolist() == sorted(np.argsort(np.array(random_table(9).ids))[:4].tolist())
