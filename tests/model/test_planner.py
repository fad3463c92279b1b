"""The planner: inside the budget from below, optimal among all shapes, legal, deterministic, never empty."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunetune.config.schema import TargetConfig
from prunetune.core.errors import BudgetError
from prunetune.model.budget import (
    Shape,
    decoder_params,
    full_shape,
    kept_fractions,
    plan_shape,
    total_params,
    weight_bytes,
)
from prunetune.model.legality import heads_legal
from prunetune.model.planner import Planner
from prunetune.model.units import KINDS, kind_size, site_name
from tests.support import MODEL_TYPES, tiny_arch

ARCH = tiny_arch("qwen2")
KIND_SETS = [kinds for n in range(1, 5) for kinds in itertools.combinations(KINDS, n)]


def random_scores(arch, seed, kinds=KINDS, scale=None):
    """Positive scores, about as large as the unit's parameters unless ``scale`` says otherwise; layers differ."""
    rng = np.random.default_rng(seed)
    of_layer = rng.exponential(size=arch.layers)
    scale = scale or {"mlp_channels": 3, "kv_groups": 64, "query_heads": 16, "layers": 300}
    scores = {}
    for kind in kinds:
        names = ["layers"] if kind == "layers" else [site_name(layer, kind) for layer in range(arch.layers)]
        for layer, name in enumerate(names):
            height = scale[kind] * (1.0 if kind == "layers" else of_layer[layer])
            scores[name] = height * rng.exponential(size=kind_size(arch, kind))
    return scores


def lost_score(arch, scores, plan):
    """Score that leaves with a plan, counted unit by unit: a removed layer counts once, and so does a removed group."""
    lost = 0.0
    layers = plan.kept_layers(arch)
    for layer in range(arch.layers):
        if layer not in layers:
            lost += scores.get("layers", np.zeros(arch.layers))[layer]
            continue
        groups = plan.kept_units(arch, layer, "kv_groups")
        heads = plan.kept_query_heads(arch, layer)
        for kind, kept in (("mlp_channels", plan.kept_units(arch, layer, "mlp_channels")), ("kv_groups", groups)):
            score = scores.get(site_name(layer, kind), np.zeros(kind_size(arch, kind)))
            lost += sum(score[unit] for unit in range(len(score)) if unit not in kept)
        score = scores.get(site_name(layer, "query_heads"), np.zeros(arch.query_heads))
        lost += sum(
            score[head]
            for head in range(arch.query_heads)
            if head not in heads and head // arch.queries_per_group in groups
        )
    return lost


def least_loss(arch, scores, shape):
    """The least score that a shape can lose, by trying every choice of groups and layers."""
    zeros = {kind: np.zeros(kind_size(arch, kind)) for kind in KINDS}

    def of(layer, kind):
        return scores.get(site_name(layer, kind), zeros[kind])

    def least_of_layer(layer):
        mlp = np.sort(of(layer, "mlp_channels"))[: arch.mlp_channels - shape.mlp_channels].sum()
        heads = of(layer, "query_heads").reshape(arch.kv_groups, -1)
        within = np.sort(heads, axis=1)[:, : arch.queries_per_group - shape.queries_per_group].sum(1)
        kv = of(layer, "kv_groups")
        return mlp + min(
            within[list(stay)].sum() + np.delete(kv, list(stay)).sum()
            for stay in itertools.combinations(range(arch.kv_groups), shape.kv_groups)
        )

    narrowed = np.array([least_of_layer(layer) for layer in range(arch.layers)])
    whole = scores.get("layers", zeros["layers"])
    return min(
        narrowed[list(stay)].sum() + np.delete(whole, list(stay)).sum()
        for stay in itertools.combinations(range(arch.layers), shape.layers)
    )


def all_shapes(arch, kinds, align):
    """Every shape that the kinds and the alignment allow, legal or not."""
    full = full_shape(arch)
    channels = [*range(align, full.mlp_channels, align), full.mlp_channels]
    return [
        Shape(*widths)
        for widths in itertools.product(
            range(1, full.layers + 1) if "layers" in kinds else [full.layers],
            range(1, full.kv_groups + 1) if "kv_groups" in kinds else [full.kv_groups],
            range(1, full.queries_per_group + 1) if "query_heads" in kinds else [full.queries_per_group],
            channels if "mlp_channels" in kinds else [full.mlp_channels],
        )
    ]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kinds", KIND_SETS, ids=lambda kinds: "+".join(kinds))
@pytest.mark.parametrize("kept", ["80%", "45%"])
def test_optimal_among_all_shapes_by_brute_force(kinds, kept, seed):
    target = TargetConfig(kept=kept, units=kinds, align=8)
    scores = random_scores(ARCH, seed, kinds)
    limit = int(target.kept * decoder_params(ARCH, full_shape(ARCH)))
    inside = [shape for shape in all_shapes(ARCH, kinds, 8) if decoder_params(ARCH, shape) <= limit]
    if not inside:
        with pytest.raises(BudgetError):
            Planner(ARCH, target)
        return
    plan = Planner(ARCH, target).plan(scores)
    best = min(least_loss(ARCH, scores, shape) for shape in inside)
    assert decoder_params(ARCH, plan_shape(ARCH, plan)) <= limit
    assert lost_score(ARCH, scores, plan) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("kind", ["kept", "params", "size"])
@pytest.mark.parametrize("align", [1, 8, 16])
def test_the_budget_is_hit_from_below_within_one_alignment_step(kind, align):
    full = full_shape(ARCH)
    for fraction in np.linspace(0.35, 1.0, 27):
        cost, dtype = {
            "kept": (lambda s: decoder_params(ARCH, s), "float32"),
            "params": (lambda s: total_params(ARCH, s), "float32"),
            "size": (lambda s: weight_bytes(ARCH, s, "bfloat16"), "bfloat16"),
        }[kind]
        # The embeddings cannot leave: the fraction is of what the MLP can give.
        least, most = cost(Shape(3, 3, 2, align)), cost(full)
        limit = int(least + fraction * (most - least))
        target = TargetConfig(**{kind: limit / most if kind == "kept" else limit}, units=("mlp_channels",), align=align)
        planner = Planner(ARCH, target, dtype)
        shape = plan_shape(ARCH, planner.plan(random_scores(ARCH, 0)))
        assert cost(shape) <= limit
        assert shape.mlp_channels % align == 0
        wider = Shape(3, 3, 2, shape.mlp_channels + align)
        assert shape == full or cost(wider) > limit


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_head_counts_are_legal_for_the_class(model_type):
    arch = tiny_arch(model_type, num_attention_heads=12, num_key_value_heads=6, head_dim=8)
    for percent in range(30, 100, 10):
        target = TargetConfig(kept=percent / 100, units=KINDS, align=4)
        planner = Planner(arch, target)
        assert all(heads_legal(arch, shape.query_heads) for shape in planner.candidates)
        shape = plan_shape(arch, planner.plan(random_scores(arch, percent)))
        assert heads_legal(arch, shape.query_heads)


def test_a_budget_that_only_illegal_heads_could_meet_is_refused():
    """MLP untouched, 48 / 5 heads is no whole number, 4 heads keep too little of the budget to be the largest."""
    arch = tiny_arch("llama", num_attention_heads=6, num_key_value_heads=6)
    kept = decoder_params(arch, Shape(3, 5, 1, 64)) / decoder_params(arch, full_shape(arch))
    plan = Planner(arch, TargetConfig(kept=kept, units=("kv_groups",))).plan(random_scores(arch, 0))
    assert plan_shape(arch, plan).query_heads == 4
    free = tiny_arch("qwen2", num_attention_heads=6, num_key_value_heads=6)
    plan = Planner(free, TargetConfig(kept=kept, units=("kv_groups",))).plan(random_scores(free, 0))
    assert plan_shape(free, plan).query_heads == 5


@pytest.mark.parametrize("kinds", KIND_SETS, ids=lambda kinds: "+".join(kinds))
def test_impossible_budgets_name_the_smallest_shape(kinds):
    smallest = min(all_shapes(ARCH, kinds, 16), key=lambda shape: decoder_params(ARCH, shape))
    least = decoder_params(ARCH, smallest)
    whole = decoder_params(ARCH, full_shape(ARCH))
    with pytest.raises(BudgetError) as caught:
        Planner(ARCH, TargetConfig(kept=(least - 1) / whole, units=kinds, align=16))
    text = str(caught.value)
    assert str(smallest) in text
    assert all(kind in text for kind in kinds)
    assert f"{100 * kept_fractions(ARCH, smallest)['decoder']:.1f}% of decoder" in text
    just = Planner(ARCH, TargetConfig(kept=(least + 0.5) / whole, units=kinds, align=16))
    assert just.candidates == [smallest]


@pytest.mark.parametrize("target", [{"params": 100}, {"size": "1KB"}, {"kept": 0.0}])
def test_below_one_unit_per_site_is_refused(target):
    with pytest.raises(BudgetError, match="smallest legal shape is 1 layers"):
        Planner(ARCH, TargetConfig(**target, units=KINDS, align=1))


def test_an_alignment_wider_than_the_model_still_names_a_shape():
    with pytest.raises(BudgetError, match="MLP 64"):
        Planner(ARCH, TargetConfig(kept="50%", units=("mlp_channels",), align=128))


def test_ties_keep_the_lower_index_and_the_larger_deeper_model():
    equal = {name: np.ones_like(values) for name, values in random_scores(ARCH, 0).items()}
    target = TargetConfig(kept="60%", units=("mlp_channels",), align=8)
    plan = Planner(ARCH, target).plan(equal)
    channels = plan_shape(ARCH, plan).mlp_channels
    assert all(kept == tuple(range(channels)) for kept in plan.kept.values())
    nothing = {name: np.zeros_like(values) for name, values in equal.items()}
    planner = Planner(ARCH, TargetConfig(kept="60%", units=KINDS, align=8))
    shape = plan_shape(ARCH, planner.plan(nothing))
    costs = [(planner.budget.cost(ARCH, candidate), candidate.layers) for candidate in planner.candidates]
    assert (planner.budget.cost(ARCH, shape), shape.layers) == max(costs)


def test_the_best_units_stay():
    scores = random_scores(ARCH, 3, ("mlp_channels", "kv_groups"))
    scores["layers.1.mlp_channels"][[7, 41]] = 1e6
    scores["layers.2.kv_groups"][2] = 1e6
    plan = Planner(ARCH, TargetConfig(kept="40%", align=8)).plan(scores)
    assert {7, 41} <= set(plan.kept["layers.1.mlp_channels"])
    assert 2 in plan.kept["layers.2.kv_groups"]


def test_everything_stays_at_100_percent():
    plan = Planner(ARCH, TargetConfig(kept="100%", units=KINDS)).plan(random_scores(ARCH, 0))
    assert plan.kept == {}


def test_the_way_to_the_budget_only_ever_shrinks():
    planner = Planner(ARCH, TargetConfig(kept="50%", units=("mlp_channels", "kv_groups"), align=16))
    scores = random_scores(ARCH, 1)
    costs = []
    for way in np.linspace(0, 1, 21):
        plan = planner.plan(scores, way=float(way), aligned=False)
        costs.append(planner.budget.cost(ARCH, plan_shape(ARCH, plan)))
        assert costs[-1] <= planner.budget.at(ARCH, way).limit
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == decoder_params(ARCH, full_shape(ARCH))


@pytest.mark.parametrize("bad", [np.full(64, np.nan), np.full(64, np.inf), np.ones(63), np.ones((64, 1))])
def test_scores_must_be_finite_and_of_the_sites_size(bad):
    planner = Planner(ARCH, TargetConfig(kept="50%", align=8))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp_channels must be 64 finite numbers"):
        planner.plan({**random_scores(ARCH, 0), "layers.1.mlp_channels": bad})


def test_tensors_arrays_and_lists_give_one_plan():
    planner = Planner(ARCH, TargetConfig(kept="50%", align=8))
    scores = {name: values.astype(np.float32) for name, values in random_scores(ARCH, 0).items()}
    plan = planner.plan(scores, origin={"method": "x"})
    assert planner.plan({name: torch.from_numpy(values) for name, values in scores.items()}).kept == plan.kept
    assert planner.plan({name: values.tolist() for name, values in scores.items()}).kept == plan.kept
    assert plan.origin["method"] == "x"
    assert plan.origin["kept"] == kept_fractions(ARCH, plan_shape(ARCH, plan))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    kept=st.floats(0.01, 1.0),
    kinds=st.sampled_from(KIND_SETS),
    align=st.sampled_from([1, 3, 8, 32]),
    seed=st.integers(0, 10_000),
    model_type=st.sampled_from(MODEL_TYPES),
    scale=st.fixed_dictionaries({kind: st.sampled_from([0.0, 1e-12, 1.0, 1e9]) for kind in KINDS}),
)
def test_every_plan_is_legal_inside_the_budget_and_repeatable(kept, kinds, align, seed, model_type, scale):
    arch = tiny_arch(model_type)
    target = TargetConfig(kept=kept, units=kinds, align=align)
    try:
        planner = Planner(arch, target)
    except BudgetError:
        return  # that the refusal is right and names the smallest shape is tested above
    scores = random_scores(arch, seed, kinds, scale)
    plan = planner.plan(scores)
    plan.check(arch)
    shape = plan_shape(arch, plan)
    assert decoder_params(arch, shape) <= kept * decoder_params(arch, full_shape(arch)) + 0.01
    assert shape.mlp_channels % align == 0 or shape.mlp_channels == 64
    assert heads_legal(arch, shape.query_heads)
    assert {name.split(".")[-1] for name in plan.kept} <= set(kinds)
    assert planner.plan(scores).kept == plan.kept
    assert Planner(arch, target).plan(dict(reversed(scores.items()))).digest() == plan.digest()


@pytest.mark.parametrize("kept", ["100%", "95%", "80%", "60%"])
@pytest.mark.parametrize("kinds", KIND_SETS, ids=lambda kinds: "+".join(kinds))
def test_alternatives_differ_in_attention_first_and_none_is_a_part_of_another(kinds, kept):
    target = TargetConfig(kept=kept, units=kinds, align=8)
    try:
        planner = Planner(ARCH, target)
    except BudgetError:
        return  # what is said then is tested above
    scores = random_scores(ARCH, 0)
    found = planner.alternatives(scores)
    shapes = [plan_shape(ARCH, plan) for plan in found]
    assert found[0].kept == planner.plan(scores).kept
    assert len(set(shapes)) == len(shapes) <= 4
    whole = [shape for shape in planner.candidates if not any(shape.within(o, ARCH) for o in planner.candidates)]
    assert set(shapes) <= set(whole)
    attention = [(shape.kv_groups, shape.queries_per_group) for shape in shapes]
    ways = len({(shape.kv_groups, shape.queries_per_group) for shape in whole})
    assert len(set(attention[: min(4, ways)])) == min(4, ways)
    assert len(shapes) == min(4, len(whole))
