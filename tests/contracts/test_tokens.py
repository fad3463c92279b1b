"""The contract of every registered token method and of the budget they share, found by discovery."""

from __future__ import annotations

import numpy as np
import pytest

from prunetune.core.errors import ConfigError, DataError
from prunetune.methods.ranking import significant
from prunetune.methods.tokens import TOKENS, TokenMethod, build_tokens, check_tokens, choose_tokens
from prunetune.model.score_table import ScoreTable

by_name = pytest.mark.parametrize("name", TOKENS.names())
by_scope = pytest.mark.parametrize("scope", ["sample", "all"])


def table(counts=(7, 1, 12, 0, 20), seed=0, **columns) -> ScoreTable:
    """Rows with random statistics of all kinds; ids are not in order."""
    rng = np.random.default_rng(seed)
    total = sum(counts)
    tokens = {
        "token": rng.integers(5, 90, total),
        "position": np.concatenate([np.zeros(0), *(np.arange(n) + 3 for n in counts)]).astype(np.int64),
        "nll": rng.exponential(1.5, total).astype(np.float32),
        "entropy": rng.exponential(1.0, total).astype(np.float32),
        "top1": rng.random(total) < 0.5,
        "el2n": rng.random(total).astype(np.float32),
        "reference_nll": rng.exponential(1.2, total).astype(np.float32),
        "protected": np.zeros(total, dtype=bool),
        "paragraph": np.concatenate([np.zeros(0), *(np.arange(n) // 3 for n in counts)]).astype(np.int64),
        **columns,
    }
    ids = [f"{(7 * i + 3) % 11:02d}" for i in range(len(counts))]
    return ScoreTable(ids, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), {}, tokens)


def whole(name) -> bool:
    """Whether whole paragraphs leave, so that a budget is met from below only."""
    return TOKENS.get(name).removes


def by_id(table: ScoreTable, keep_T: np.ndarray) -> dict[str, list[bool]]:
    return {name: keep_T[table.offsets[i] : table.offsets[i + 1]].tolist() for i, name in enumerate(table.ids)}


def test_the_methods_are_found():
    assert set(TOKENS.names()) >= {
        "random", "loss", "excess_loss", "token_cleaning", "neighbour_perplexity", "probability", "entropy",
        "paragraph_surprisal",
    }  # fmt: skip


@by_name
def test_docstring_and_summary(name):
    kind = TOKENS.get(name)
    assert issubclass(kind, TokenMethod)
    assert TOKENS.summary(name) == kind.__dict__["__doc__"].strip().splitlines()[0]
    assert len(TOKENS.summary(name)) > 20
    assert all(field.description for field in kind.Options.model_fields.values())


@by_name
def test_scores_are_one_finite_number_a_token_and_arguments_are_untouched(name):
    given, copy = table(), table()
    scores = build_tokens(name, {}).scores(given)
    assert scores.shape == (40,)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    for column, values in given.tokens.items():
        np.testing.assert_array_equal(values, copy.tokens[column])


@by_name
@by_scope
def test_keeping_everything_keeps_everything(name, scope):
    assert choose_tokens(build_tokens(name, {}), table(), 1.0, scope=scope).all()


@by_name
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.7, 0.9])
def test_every_row_keeps_its_fraction_rounded_up(name, kept):
    given = table()
    left = given.total(choose_tokens(build_tokens(name, {}), given, kept, floor=0.0))
    wanted = [max(1, int(np.ceil(kept * n - 1e-9))) if n else 0 for n in given.targets]
    if not whole(name):
        assert left.tolist() == wanted
    else:
        assert (left <= np.maximum(wanted, 3)).all()
        assert (left >= np.minimum(given.targets, 1)).all()


@by_name
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.7])
def test_a_common_budget_is_met_to_the_token(name, kept):
    keep = choose_tokens(build_tokens(name, {}), table(), kept, scope="all", floor=0.1)
    if not whole(name):
        assert keep.sum() == round(kept * 40)
    else:
        assert kept * 40 - 3 < keep.sum() <= kept * 40


@by_name
@by_scope
def test_protected_tokens_stay_and_count(name, scope):
    given = table(protected=np.arange(40) % 4 == 0)
    keep = choose_tokens(build_tokens(name, {}), given, 0.5, scope=scope)
    assert keep[::4].all()
    if not whole(name):
        assert given.total(keep).sum() == (20 if scope == "all" else 4 + 1 + 6 + 10)


@by_name
@by_scope
def test_more_protected_tokens_than_the_budget(name, scope):
    protected = np.arange(40) < 30
    keep = choose_tokens(build_tokens(name, {}), table(protected=protected), 0.1, scope=scope, floor=0.0)
    assert keep[:30].all()
    # Of whole paragraphs the one that 29 stands in stays, and the last one.
    assert np.flatnonzero(keep[30:]).tolist() == ([0, 1, 8, 9] if whole(name) else [])


@by_name
@by_scope
def test_rows_outside_are_untouched(name, scope):
    given = table()
    rows = np.array([False, True, True, True, False])
    keep = choose_tokens(build_tokens(name, {}), given, 0.75, rows=rows, scope=scope)
    assert keep[~rows[given.row_of_token]].all()
    if scope == "all" and not whole(name):
        assert keep.sum() == 30  # what the outside rows keep counts toward the common budget
    if scope == "sample" and not whole(name):
        assert given.total(keep).tolist() == [7, 1, 9, 0, 20]


@by_name
@by_scope
def test_every_row_keeps_its_floor(name, scope):
    """One row is far worse than the others by every measure, either way round."""
    for sign in (0.01, 100.0):
        columns = {
            key: np.concatenate([np.full(20, sign), np.linspace(1, 2, 20)]).astype(np.float32)
            for key in ("nll", "entropy", "reference_nll")
        }
        given = table(counts=(20, 20), **columns)
        left = given.total(choose_tokens(build_tokens(name, {}), given, 0.4, scope=scope, floor=0.3))
        assert (left >= 6).all()


@pytest.mark.parametrize("name", [name for name in TOKENS.names() if not whole(name)])
@by_scope
@pytest.mark.parametrize("seed", range(6))
def test_no_dropped_token_outranks_a_kept_one(name, scope, seed):
    rng = np.random.default_rng(seed)
    given = table(counts=tuple(rng.integers(0, 15, 8)), seed=seed)
    fixed = rng.random(int(given.offsets[-1])) < 0.2
    given.tokens["protected"][:] = fixed
    method, floor = build_tokens(name, {}), 0.2
    keep = choose_tokens(method, given, 0.5, scope=scope, floor=floor)
    ranked = significant(method.scores(given))
    spare = keep & ~fixed
    for row in range(len(given)):
        inside = given.row_of_token == row
        if (spare & inside).any() and (~keep & inside).any():
            assert ranked[spare & inside].min() >= ranked[~keep & inside].max()
    if scope == "all":
        least = np.maximum(np.ceil(floor * given.targets - 1e-9), np.minimum(1, given.targets))
        above = given.total(keep) > least
        spare &= above[given.row_of_token]
        if spare.any() and (~keep).any():
            assert ranked[spare].min() >= ranked[~keep].max()


@by_name
@by_scope
def test_neither_the_order_of_rows_nor_noise_nor_batching_matters(name, scope):
    given = table(counts=(9, 4, 12, 5, 20), seed=3)
    first = by_id(given, choose_tokens(build_tokens(name, {}, seed=4), given, 0.6, scope=scope))
    order = np.array([3, 0, 4, 2, 1])
    other = given.pick(order)
    noisy = {
        key: (column * np.float32(1 + 2e-7)).astype(np.float32) if column.dtype == np.float32 else column
        for key, column in other.tokens.items()
    }
    other = ScoreTable(other.ids, other.offsets, other.rows, noisy)
    assert by_id(other, choose_tokens(build_tokens(name, {}, seed=4), other, 0.6, scope=scope)) == first
    if scope == "sample":
        for row in range(5):
            alone = given.pick(np.array([row]))
            keep = choose_tokens(build_tokens(name, {}, seed=4), alone, 0.6, scope=scope)
            assert keep.tolist() == first[given.ids[row]]


@by_name
@by_scope
def test_equal_scores_are_cut_at_one_place_whatever_the_order(name, scope):
    columns = {key: np.ones(40, np.float32) for key in ("nll", "entropy", "reference_nll")}
    given = table(**columns)
    first = by_id(given, choose_tokens(build_tokens(name, {}), given, 0.5, scope=scope))
    other = given.pick(np.arange(5)[::-1])
    assert by_id(other, choose_tokens(build_tokens(name, {}), other, 0.5, scope=scope)) == first


@by_name
@by_scope
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_bad_statistics_are_defined(name, scope, bad):
    columns = {key: np.full(40, bad, np.float32) for key in ("nll", "entropy", "reference_nll")}
    keep = choose_tokens(build_tokens(name, {}), table(**columns), 0.5, scope=scope)
    assert (whole(name) and keep.any()) or keep.sum() == (20 if scope == "all" else 4 + 1 + 6 + 10)
    one = table()
    one.tokens["nll"][5] = bad
    assert choose_tokens(build_tokens(name, {}), one, 0.5, scope=scope).any()


@by_name
@by_scope
@pytest.mark.parametrize("counts", [(), (0,), (1,), (0, 0)])
def test_next_to_no_tokens(name, scope, counts):
    assert choose_tokens(build_tokens(name, {}), table(counts), 0.5, scope=scope).tolist() == [True] * sum(counts)


@pytest.mark.parametrize("name", [name for name, kind in TOKENS.items() if kind.needs])
def test_missing_columns_are_named(name):
    given = table()
    lacking = sorted(TOKENS.get(name).needs)[0]
    tokens = {key: column for key, column in given.tokens.items() if key != lacking}
    with pytest.raises(DataError, match=lacking):
        choose_tokens(build_tokens(name, {}), ScoreTable(given.ids, given.offsets, {}, tokens), 0.5)


@pytest.mark.parametrize(("kept", "floor"), [(0.0, 0.1), (1.2, 0.1), (0.5, -0.1), (0.5, 1.1)])
def test_impossible_fractions_are_refused(kept, floor):
    with pytest.raises(ValueError, match="not in"):
        choose_tokens(build_tokens("random", {}), table(), kept, floor=floor)


@by_name
def test_unknown_options_are_refused_with_a_suggestion(name):
    known = next(iter(TOKENS.get(name).Options.model_fields), None)
    with pytest.raises(ConfigError) as caught:
        build_tokens(name, {f"{known or 'x'}s": 1})
    assert (f"did you mean {known!r}" if known else "it has no options") in str(caught.value)
    assert len(check_tokens(name, {f"{known or 'x'}s": 1})) == 1
    assert check_tokens(name, {}) == []


def test_unknown_methods_are_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'excess_loss'"):
        build_tokens("exces_loss", {})
