"""Plans: round trip, digest, and files or models that they do not belong to."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunetune.core.errors import PlanMismatchError
from prunetune.model.plan import FORMAT, VERSION, Plan
from prunetune.model.units import KINDS, site_name
from tests.support import random_plan, tiny_arch

ARCH = tiny_arch()


@pytest.mark.parametrize("kinds", [KINDS, ("mlp_channels",), ("layers",), ()])
def test_round_trip(tmp_path, kinds):
    plan = random_plan(ARCH, kinds, seed=3)
    plan.save(tmp_path / "deep" / "plan.json")
    again = Plan.load(tmp_path / "deep" / "plan.json")
    assert again == plan
    assert again.origin == plan.origin
    assert again.digest() == plan.digest()
    again.check(ARCH)


def test_digest_depends_on_the_decision_alone():
    plan = random_plan(ARCH, seed=1)
    shuffled = Plan(dict(reversed(plan.kept.items())), plan.architecture, {"other": 1})
    assert shuffled.digest() == plan.digest()
    assert random_plan(ARCH, seed=2).digest() != plan.digest()


def test_a_site_that_is_absent_keeps_everything():
    plan = Plan({}, ARCH.fingerprint())
    assert plan.kept_layers(ARCH) == (0, 1, 2)
    assert plan.kept_units(ARCH, 1, "mlp_channels") == tuple(range(64))
    assert plan.kept_query_heads(ARCH, 1) == tuple(range(6))


def test_query_heads_leave_with_their_group():
    plan = Plan({"layers.0.kv_groups": (0, 2)}, ARCH.fingerprint())
    assert plan.kept_query_heads(ARCH, 0) == (0, 1, 4, 5)
    both = Plan({"layers.0.kv_groups": (0, 2), "layers.0.query_heads": (1, 2, 5)}, ARCH.fingerprint())
    assert both.kept_query_heads(ARCH, 0) == (1, 5)
    both.check(ARCH)


@pytest.mark.parametrize("field", ["hidden_size", "layers", "query_heads", "kv_groups", "head_dim", "mlp_channels",
                                   "vocab_size", "family"])  # fmt: skip
def test_a_plan_for_another_model_is_refused_naming_the_difference(field):
    other = {**ARCH.fingerprint(), field: 7}
    with pytest.raises(PlanMismatchError, match=rf"{field} 7 there"):
        Plan({}, other).check(ARCH)
    with pytest.raises(PlanMismatchError, match=rf"{field} None there"):
        Plan({}, {key: value for key, value in other.items() if key != field}).check(ARCH)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("layers.0.mlp_channels", ()),
        ("layers.0.mlp_channels", (3, 3)),
        ("layers.0.mlp_channels", (4, 3)),
        ("layers.0.mlp_channels", (0, 64)),
        ("layers.0.mlp_channels", (-1, 3)),
        ("layers.3.mlp_channels", (1,)),
        ("layers.00.mlp_channels", (1,)),
        ("layers.0.layers", (1,)),
        ("layers", (0, 3)),
        ("layers", ()),
        ("nonsense", (0,)),
    ],
)
def test_kept_lists_that_cannot_be_are_refused(name, kept):
    with pytest.raises(PlanMismatchError):
        Plan({name: kept}, ARCH.fingerprint()).check(ARCH)


@pytest.mark.parametrize("heads", [(0, 1, 2), (0, 2), (0, 1, 2, 3, 4)])
def test_groups_must_keep_equally_many_heads(heads):
    with pytest.raises(PlanMismatchError, match="same number of query heads"):
        Plan({"layers.1.query_heads": heads}, ARCH.fingerprint()).check(ARCH)


def test_a_group_that_stays_must_keep_a_head():
    with pytest.raises(PlanMismatchError, match="at least one"):
        Plan({"layers.1.kv_groups": (0,), "layers.1.query_heads": (2, 3)}, ARCH.fingerprint()).check(ARCH)


def test_head_counts_of_a_removed_layer_do_not_matter():
    Plan({"layers": (0, 2), "layers.1.query_heads": (0, 1, 2)}, ARCH.fingerprint()).check(ARCH)


GOOD = {"format": FORMAT, "version": VERSION, "architecture": ARCH.fingerprint(), "origin": {}, "kept": {}}
HOSTILE = {
    "empty": "",
    "cut off": json.dumps(GOOD)[:-9],
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "no format": json.dumps({**GOOD, "format": None}),
    "another version": json.dumps({**GOOD, "version": 2}),
    "no kept": json.dumps({key: value for key, value in GOOD.items() if key != "kept"}),
    "kept a list": json.dumps({**GOOD, "kept": [1]}),
    "architecture a list": json.dumps({**GOOD, "architecture": ["hidden_size"]}),
    "origin a string": json.dumps({**GOOD, "origin": "here"}),
    "text index": json.dumps({**GOOD, "kept": {"layers": ["1"]}}),
    "fractional index": json.dumps({**GOOD, "kept": {"layers": [0.5]}}),
    "true for an index": json.dumps({**GOOD, "kept": {"layers": [True]}}),
    "infinite index": json.dumps({**GOOD, "kept": {"layers": [float("inf")]}}),
    "string for a list": json.dumps({**GOOD, "kept": {"layers": "012"}}),
    "null for a list": json.dumps({**GOOD, "kept": {"layers": None}}),
    "nested without end": "[" * 100_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_files_that_are_no_plan_are_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanMismatchError, match=r"plan\.json"):
        Plan.load(path)


def test_paths_that_hold_no_plan_are_refused(tmp_path):
    with pytest.raises(PlanMismatchError, match="no plan at"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanMismatchError, match="not a plan file"):
        Plan.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(PlanMismatchError, match="not a plan file"):
        Plan.load(tmp_path / "binary")


kept_lists = st.dictionaries(
    st.sampled_from(["layers", *(site_name(layer, kind) for layer in range(3) for kind in KINDS[:3])]),
    st.lists(st.integers(-2, 66), max_size=6).map(tuple),
    max_size=5,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(kept_lists)
def test_a_checked_plan_never_leaves_anything_empty(kept):
    plan = Plan(kept, ARCH.fingerprint())
    try:
        plan.check(ARCH)
    except PlanMismatchError:
        return
    assert plan.kept_layers(ARCH)
    for layer in plan.kept_layers(ARCH):
        groups, heads = plan.kept_units(ARCH, layer, "kv_groups"), plan.kept_query_heads(ARCH, layer)
        assert groups
        assert len(heads) % len(groups) == 0
        assert {head // 2 for head in heads} == set(groups)
