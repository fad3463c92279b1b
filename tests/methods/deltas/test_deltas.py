"""Delta methods: right on average and in variance, exact at the ends, the same for any blocks, rows or columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prunetune.core.errors import ConfigError, DataError
from prunetune.core.streams import lattice
from prunetune.methods.deltas import DELTAS, DeltaContext, build_delta, check_delta
from prunetune.methods.deltas.rank import decompose
from prunetune.model import deltas
from prunetune.model.deltas import Delta, Difference, LowRank, Place, alignment

M, N, R = 24, 37, 4
DROPS = [name for name in DELTAS.names() if "drop" in DELTAS.get(name).Options.model_fields]


def factors(seed=0, rank=R):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, N, generator=generator), torch.randn(M, rank, generator=generator)


def lora(place=None, seed=0):
    return LowRank(place or Place("w", (M, N)), *factors(seed), 0.5)


def full(place=None, seed=0):
    dense = lora(seed=seed).whole()
    return Difference(place or Place("w", (M, N)), lambda a, b: dense[a:b] + 1, lambda a, b: torch.ones(b - a, N))


def outer_product():
    """(N, N) second moment of inputs of very different sizes."""
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randn(300, N, generator=generator) * torch.linspace(0.1, 3, N)
    return inputs.T @ inputs / 300


def context(seed=0, model="a"):
    outer, dense = outer_product(), lora().whole()
    energy = float(((dense @ outer) * dense).sum())
    return DeltaContext(seed, model, outer.diagonal().clone(), energy, torch.linspace(-1, 2, N))


def options_of(name, drop):
    return {"drop": drop} | ({"epsilon": 0.02} if name == "della" else {})


def applied(name, delta, drop=0.6, ctx=None, **options):
    return build_delta(name, {**options_of(name, drop), **options}).apply(delta, ctx or context())


@pytest.mark.parametrize("name", DELTAS.names())
def test_every_method_says_what_it_is(name):
    assert DELTAS.summary(name)
    assert DELTAS.get(name).paper or name == "identity"


@pytest.mark.parametrize("name", DROPS)
@pytest.mark.parametrize("make", [lora, full])
def test_drop_nothing_is_the_delta_and_drop_all_is_nothing(name, make):
    delta = make()
    extra = {"q": 1.0} if name == "darex_q" else {}
    if name != "darex_q":
        assert torch.equal(applied(name, delta, 0.0).whole(), delta.whole())
    assert torch.equal(applied(name, delta, 1.0, **extra).whole(), torch.zeros(M, N))


@pytest.mark.parametrize("name", DELTAS.names())
@pytest.mark.parametrize("make", [lora, full])
def test_blocks_change_nothing(name, make, monkeypatch):
    options = options_of(name, 0.7) if name in DROPS else {}
    whole = build_delta(name, options).apply(make(), context())
    expected = whole.whole()
    for step in (1, 5, 23):
        pieces = [whole.rows(start, min(start + step, M)) for start in range(0, M, step)]
        torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(deltas.Delta.blocks, "__defaults__", (4 * N * 3,))
    torch.testing.assert_close(
        build_delta(name, options).apply(make(), context()).whole(), expected, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["dare", "darex_q", "della", "structural"])
def test_masks_belong_to_seed_model_and_tensor(name):
    other_tensor = lora(Place("v", (M, N)))
    same = applied(name, lora()).whole()
    assert torch.equal(same, applied(name, lora()).whole())
    for delta, ctx in ((lora(), context(seed=1)), (lora(), context(model="b")), (other_tensor, context())):
        assert not torch.equal(applied(name, delta, ctx=ctx).whole() == 0, same == 0)


@pytest.mark.parametrize("name", ["dare", "structural", "identity"])
def test_pruning_a_sliced_delta_is_slicing_the_pruned_one(name):
    rows, columns = torch.tensor([0, 1, 5, 6, 20]), torch.tensor([2, 3, 4, 30, 36])
    a, b = factors()
    sliced = LowRank(Place("w", (M, N), rows, columns), a[:, columns], b[rows], 0.5)
    options = {"drop": 0.5} if name != "identity" else {}
    dense = build_delta(name, options).apply(lora(), context()).whole()[rows][:, columns]
    found = build_delta(name, options).apply(sliced, context()).whole()
    torch.testing.assert_close(found, dense, atol=1e-6, rtol=1e-5)
    assert torch.equal(found == 0, dense == 0)


@pytest.mark.parametrize("name", ["dare", "della", "structural"])
def test_the_mean_over_masks_is_the_delta(name):
    delta = lora()
    runs = torch.stack([applied(name, delta, 0.5, context(seed)).whole().double() for seed in range(1000)])
    error = (runs.mean(0) - delta.whole()).abs()
    spread = runs.std(0) / 1000**0.5
    assert (error <= 5 * spread + 1e-6).all()
    assert error.mean() < 2 * spread.mean()


def test_the_variance_of_dare_is_that_of_the_formula():
    delta = lora()
    runs = torch.stack([applied("dare", delta, 0.75, context(seed)).whole().double() for seed in range(2000)])
    expected = (1 / 0.25 - 1) * delta.whole().double().square()
    ratio = runs.var(0).sum() / expected.sum()
    assert float(ratio) == pytest.approx(1.0, abs=0.03)


def test_q_of_one_minus_drop_is_dare_bit_for_bit():
    for drop in (0.5, 0.9, 0.99):
        dare, darex = applied("dare", lora(), drop), applied("darex_q", lora(), drop, q=1 - drop)
        assert torch.equal(dare.whole(), darex.whole())
        assert torch.equal(dare.whole(), applied("darex_q", lora(), drop, multiplier=0.0).whole())


@pytest.mark.parametrize("make", [lora, full])
@pytest.mark.parametrize("drop", [0.5, 0.9, 0.99])
def test_closed_form_q_is_the_best_of_a_grid(make, drop):
    delta, ctx = make(), context()
    dense, outer = delta.whole().double(), outer_product().double()
    ours = build_delta("darex_q", {"drop": drop}).divisor(delta, ctx)
    keep = 1 - drop

    def error(q):
        """E|D~x - Dx|^2 over masks and tokens, from mean and variance of a Bernoulli mask."""
        bias = (keep / q - 1) ** 2 * ((dense @ outer) * dense).sum()
        return float(bias + keep * drop / q**2 * (dense.square() @ outer.diagonal()).sum())

    grid = np.arange(keep, 1.0001, 0.001)
    best = float(grid[np.argmin([error(q) for q in grid])])
    assert ours == pytest.approx(best, abs=0.001)


@pytest.mark.parametrize("make", [lora, full])
@pytest.mark.parametrize("eta", [0.02, 0.3, 2.0])
def test_analytic_q_is_the_papers_scan(make, eta):
    """The scan over q that the paper makes, row by row, for a delta small enough to scan."""
    delta, means, drop = make(), context().means, 0.9
    keep, phi = 1 - drop, (1 - 2 * drop) / np.log((1 - drop) / drop)
    c = delta.whole().double() * means
    grid = np.arange(keep, 1.0, 0.001)
    rows = []
    for row in c:
        bias, noise = float(row.sum().abs()), float(row.square().sum())
        bound = eta * (1 - keep / grid) * bias + eta**2 * phi * noise / (4 * grid**2)
        rows.append(grid[np.argmin(bound)])
    rows = np.minimum(rows, np.quantile(rows, 0.8))
    found = build_delta("darex_q", {"drop": drop, "q": "analytic", "eta": eta}).divisor(delta, context())
    assert found == pytest.approx(rows.mean(), abs=0.002)


def test_what_is_left_to_a_search_is_said():
    assert build_delta("darex_q", {"drop": 0.9}).search.option == "multiplier"
    searched = build_delta("darex_q", {"drop": "99%", "q": "search"}).search
    assert (searched.option, searched.values[0], searched.values[-1]) == ("q", pytest.approx(0.01), 1.0)
    assert build_delta("darex_q", {"q": "analytic"}).search.option == "eta"
    for settled in ({"q": "closed_form"}, {"q": "30%"}, {"q": "analytic", "eta": 0.5}, {"drop": 0.0}, {"drop": 1.0}):
        assert build_delta("darex_q", settled).search is None
    with pytest.raises(DataError, match="search"):
        applied("darex_q", lora(), 0.5, q="search")


@pytest.mark.parametrize("name", ["dare", "darex_q", "structural", "rank", "identity"])
def test_what_stays_an_adapter_is_one(name):
    options = {"drop": 0.5} if name != "identity" else {}
    found = build_delta(name, options).on_factors(lora(), context())
    assert isinstance(found, LowRank)
    assert torch.equal(found.b, lora().b) or name == "rank"
    assert len(found.a) == (R // 2 if name == "rank" else R)
    columns = torch.tensor([2, 3, 4, 30, 36])
    a, b = factors()
    sliced = build_delta(name, options).on_factors(
        LowRank(Place("w", (M, N), None, columns), a[:, columns], b, 0.5), context_of_columns(columns)
    )
    if name in ("dare", "structural", "identity"):
        torch.testing.assert_close(sliced.whole(), found.whole()[:, columns], atol=1e-6, rtol=1e-5)


def context_of_columns(columns):
    ctx = context()
    return DeltaContext(ctx.seed, ctx.model, ctx.inputs[columns], ctx.energy, ctx.means[columns])


def test_masking_a_alone_is_unbiased_and_keeps_the_rank():
    runs = [
        build_delta("dare", {"drop": 0.5}).on_factors(lora(), context(seed)).whole().double() for seed in range(800)
    ]
    found = torch.stack(runs)
    assert ((found.mean(0) - lora().whole()).abs() <= 5 * found.std(0) / 800**0.5 + 1e-6).all()
    whole = build_delta("dare", {"drop": 0.5}).on_factors(lora(), context())
    assert torch.equal(whole.b, lora().b)
    assert float((whole.a == 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert build_delta("magnitude", {}).on_factors(lora(), context()) is None
    assert build_delta("dare", {"rescale": "l1"}).on_factors(lora(), context()) is None


def test_alignment_of_factors_is_that_of_the_matrix():
    ctx = context()
    found = [alignment(make(), ctx.inputs, ctx.energy) for make in (lora, full)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    # Independent inputs of one size: nothing but the diagonal is left, and the contributions add nothing.
    plain = float(lora().whole().double().square().sum())
    assert alignment(lora(), torch.ones(N), plain) == pytest.approx(1.0, rel=1e-5)


def test_l1_keeps_the_absolute_sum():
    pruned = applied("dare", lora(), 0.9, rescale="l1").whole()
    assert float(pruned.abs().sum()) == pytest.approx(float(lora().whole().abs().sum()), rel=1e-5)
    unscaled = applied("dare", lora(), 0.9, rescale="none").whole()
    kept = unscaled != 0
    assert torch.equal(unscaled[kept], lora().whole()[kept])


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_magnitude_keeps_exactly_the_largest(scope, outliers):
    dense = lora().whole()
    found = applied("magnitude", full(), 0.7, scope=scope, outliers=outliers).whole()
    parts = zip(dense, found) if scope == "row" else [(dense.flatten(), found.flatten())]
    for before, after in parts:
        count, skip = int(0.3 * len(before) + 1e-6), int(outliers * len(before))
        order = before.abs().argsort(descending=True)[skip : skip + count]
        assert set(after.nonzero().flatten().tolist()) == set(order.tolist())


@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_magnitude_over_the_whole_model_keeps_the_largest_of_all_tensors(outliers):
    dense = {name: lora(seed=seed).whole().mul(scale).round(decimals=1) for seed, (name, scale) in enumerate(SCALES)}
    parts = {
        name: Difference(Place(name, (M, N)), lambda a, b, w=w: w[a:b], lambda a, b: torch.zeros(b - a, N))
        for name, w in dense.items()
    }
    method = build_delta("magnitude", {"drop": 0.9, "scope": "model", "outliers": outliers})
    ranks = method.ranks_of(parts)
    found = torch.cat([method.apply(parts[n], DeltaContext(ranks=ranks[n])).whole().flatten() for n in parts])
    everything = torch.cat([w.flatten() for w in dense.values()])
    order = torch.sort(everything.abs(), descending=True, stable=True).indices
    skip = int(outliers * everything.numel())
    expected = torch.zeros_like(everything)
    chosen = order[skip : skip + int(0.1 * everything.numel())]
    expected[chosen] = everything[chosen]
    assert torch.equal(found, expected)
    with pytest.raises(DataError, match="alone"):
        method.apply(parts["w0"], DeltaContext())


SCALES = (("w0", 1.0), ("w1", 0.3), ("w2", 2.0))


def test_magnitude_is_exact_with_ties_and_zeros():
    dense = torch.tensor([[1.0, -1.0, 0.0, 2.0], [1.0, 0.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.5]])

    class Fixed(Delta):
        def rows(self, start, stop):
            return dense[start:stop]

    fixed = Fixed(Place("w", (3, 4)))
    for count in range(13):
        found = build_delta("magnitude", {"drop": 1 - count / 12}).apply(fixed, DeltaContext())
        pieces = torch.cat([found.rows(i, i + 1) for i in range(3)])
        order = sorted(range(12), key=lambda i: (-abs(float(dense.flatten()[i])), i))[:count]
        expected = torch.zeros(12)
        expected[order] = dense.flatten()[order]
        assert torch.equal(pieces.flatten(), expected), count


def test_wanda_weighs_by_inputs():
    ctx = context()
    found = applied("wanda", lora(), 0.8, ctx).whole()
    score = lora().whole().abs() * ctx.inputs.sqrt()
    for row in range(M):
        best = score[row].topk(int(0.2 * N)).indices
        assert set(found[row].nonzero().flatten().tolist()) == set(best.tolist())
    with pytest.raises(DataError, match="--calibration"):
        applied("wanda", lora(), 0.5, DeltaContext())
    with pytest.raises(DataError, match="--calibration"):
        applied("darex_q", lora(), 0.5, DeltaContext())


def test_della_favours_the_large():
    delta = full()
    kept = torch.stack([applied("della", delta, 0.5, context(seed), epsilon=0.3).whole() != 0 for seed in range(600)])
    share, rank = kept.double().mean(0), delta.whole().abs().argsort(dim=1).argsort(dim=1)
    assert float(share[rank == N - 1].mean()) == pytest.approx(0.8, abs=0.02)
    assert float(share[rank == 0].mean()) == pytest.approx(0.2, abs=0.02)


def test_structural_drops_whole_columns_and_stays_low_rank():
    pruned = applied("structural", lora(), 0.5)
    assert isinstance(pruned, LowRank)
    dead = (pruned.whole() == 0).all(0)
    assert 0 < int(dead.sum()) < N
    assert torch.equal((pruned.whole() == 0).any(0), dead)
    torch.testing.assert_close(pruned.whole(), applied("structural", full(), 0.5).whole(), atol=1e-5, rtol=1e-5)


def test_rank_keeps_the_energy_asked_for():
    values = torch.linalg.svdvals(lora().whole())
    torch.testing.assert_close(decompose(lora())[1], values[:R], atol=1e-4, rtol=1e-4)
    for make in (lora, full):
        torch.testing.assert_close(
            build_delta("rank", {"energy": 1.0}).apply(make(), context()).whole(), lora().whole(), atol=1e-4, rtol=1e-4
        )
        half = build_delta("rank", {"energy": 0.5}).apply(make(), context())
        lost = float((half.whole() - lora().whole()).square().sum() / lora().whole().square().sum())
        assert lost <= 0.5
        assert half.a.shape[0] == int((values.square().cumsum(0) < 0.5 * values.square().sum()).sum()) + 1


def test_bad_options_are_explained():
    assert check_delta("dare", {"drop": 1.5})
    assert check_delta("dare", {"rescale": 0.0})
    assert check_delta("della", {"drop": 0.9, "epsilon": 0.2})
    assert check_delta("structural", {"q": 0.0})
    assert not check_delta("dare", {"drop": "90%"})
    with pytest.raises(ConfigError, match="did you mean"):
        build_delta("dar", {})


def test_lattice_is_one_matrix_however_it_is_drawn():
    for columns in (1, 7, 8, 9, 40):
        whole = lattice(3, "t", rows=slice(0, 11), columns=columns)
        parts = [lattice(3, "t", rows=slice(i, i + 1), columns=columns) for i in range(11)]
        assert np.array_equal(np.concatenate(parts), whole)
    words = lattice(0, "t", rows=slice(0, 200), columns=500).astype(np.float64) / 2**32
    assert words.mean() == pytest.approx(0.5, abs=0.005)
    assert abs(np.corrcoef(words[0], words[1])[0, 1]) < 0.15
    # Written down: the layout is what stored deltas rely on.
    assert (
        lattice(0, "w", rows=slice(1, 2), columns=3).tolist()
        == lattice(0, "w", rows=slice(0, 2), columns=3)[1:].tolist()
    )
