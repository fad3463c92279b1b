"""The contract of every registered rank method, found by discovery; then each importance and decision by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prunetune.config.load import load_config
from prunetune.core.errors import ConfigError
from prunetune.methods.ranks import RANKS, RankMethod, SeenAdapter, build_ranks, check_ranks
from prunetune.pipeline.checks import check_methods

by_name = pytest.mark.parametrize("name", RANKS.names())
BUDGETED = [name for name, kind in RANKS.items() if "kept" in kind.Options.model_fields]


def adapters(number: int = 10, seed: int = 0) -> list[SeenAdapter]:
    """Adapters of different ranks and widths."""
    generator = torch.Generator().manual_seed(seed)

    def one(index: int) -> SeenAdapter:
        importance_r = torch.rand(2 + index % 4, generator=generator)
        return SeenAdapter(
            f"layers.{index}.up", 24 + 8 * (index % 3), importance_r, float(torch.rand(1, generator=generator))
        )

    return [one(index) for index in range(number)]


def params_after(seen: list[SeenAdapter], method: RankMethod) -> int:
    changes = method.ranks(seen)
    return sum(a.features * (changes[a.path].rank if a.path in changes else len(a.importance_r)) for a in seen)


def test_the_methods_are_found():
    assert {"keep", "light_peft", "apt"} <= set(RANKS.names())


@by_name
def test_docstring_and_options(name):
    kind = RANKS.get(name)
    assert issubclass(kind, RankMethod)
    assert len(RANKS.summary(name)) > 20
    assert kind.needs
    assert kind.cost
    assert all(field.description for field in kind.Options.model_fields.values())


@by_name
def test_decisions_are_valid_deterministic_and_leave_the_arguments_alone(name):
    seen, method = adapters(), build_ranks(name, {})
    before = [a.importance_r.clone() for a in seen]
    changes = method.ranks(seen)
    assert changes == build_ranks(name, {}).ranks(adapters())
    assert all(torch.equal(a.importance_r, copy) for a, copy in zip(seen, before, strict=True))
    ranks = {a.path: len(a.importance_r) for a in seen}
    assert changes.keys() <= ranks.keys()
    for path, change in changes.items():
        assert list(change.kept) == sorted(set(change.kept))
        assert set(change.kept) <= set(range(ranks[path]))
        assert change.added >= 0


@pytest.mark.parametrize("kept", [0.05, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("name", BUDGETED)
def test_the_budget_is_met_from_below_within_one_rank(name, kept):
    for seed in range(5):
        seen = adapters(seed=seed)
        budget = kept * sum(a.params for a in seen)
        assert budget - max(a.features for a in seen) < params_after(seen, build_ranks(name, {"kept": kept})) <= budget


@by_name
def test_some_rank_always_stays_and_nothing_known_is_no_problem(name):
    tiny = {"kept": 1e-6} if name in BUDGETED else {}
    blank = [SeenAdapter(a.path, a.features, torch.zeros_like(a.importance_r)) for a in adapters()]
    for seen in (adapters(), adapters(1), blank):
        assert params_after(seen, build_ranks(name, tiny)) > 0


@by_name
def test_unknown_options_are_refused_with_a_suggestion(name):
    known = next(iter(RANKS.get(name).Options.model_fields), None)
    [problem] = check_ranks(name, {f"{known or 'x'}s": 1})
    assert problem.field.startswith("lora.ranks.")
    assert (f"did you mean {known!r}" if known else "it has no options") in problem.message


@pytest.mark.parametrize(("method", "value"), [("light_peft", "120%"), ("light_peft", 0), ("apt", "500%"), ("apt", 2)])
def test_bad_budgets_are_refused(method, value):
    [problem] = check_ranks(method, {"kept": value})
    assert problem.field == "lora.ranks.kept"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lora.ranks=light_pet"], "did you mean 'light_peft'"),
        (["lora.ranks=light_peft", "lora.ranks.modul=1"], "did you mean 'modules'"),
        (["lora.ranks.kept=50%"], "'keep' has no such option"),
        (["lora.rank_s=apt"], "did you mean"),
    ],
)
def test_faults_of_a_configuration_are_named(overrides: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        load_config(None, ["model=some-model", "target=60%", *overrides], checks=[check_methods])


def test_a_configuration_reaches_the_method_in_both_spellings():
    short = load_config(None, ["model=some-model", "target=60%", "lora.ranks=apt"], checks=[check_methods])
    assert short.prune().ranks.method == "apt"
    long = load_config(None, ["model=some-model", "target=60%", "lora.ranks={method: light_peft, kept: 40%}"])
    assert build_ranks("light_peft", long.prune().ranks.options()).options.kept == 0.4


def test_light_peft_importance_by_hand():
    a, grad_a = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0.5, 0.5], [1.0, 3.0]])
    b, grad_b = torch.tensor([[1.0, 2.0], [0.0, 1.0], [2.0, 1.0]]), torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, -3.0]])
    # Rank 0: |mean(0.5, 1)| + |mean(3, 0, 0)|; rank 1: |mean(3, -3)| + |mean(2, 1, -3)|.
    found = build_ranks("light_peft", {}).importance(a, b, grad_a, grad_b)
    torch.testing.assert_close(found, torch.tensor([0.75 + 1.0, 0.0]))


def test_apt_salience_by_hand_and_that_a_and_b_agree_on_it():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 5, generator=generator), torch.randn(4, 3, generator=generator)
    grad_w = torch.randn(4, 5, generator=generator)  # of the product B A
    found = build_ranks("apt", {}).importance(a, b, b.T @ grad_w, grad_w @ a.T)
    by_hand = torch.stack([(grad_w * torch.outer(b[:, i], a[i])).sum().abs() for i in range(3)])
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(found, (b * (grad_w @ a.T)).sum(0).abs())


def seen(path: str, importance: list[float], ratio: float = 0.0, features: int = 10) -> SeenAdapter:
    return SeenAdapter(path, features, torch.tensor(importance, dtype=torch.float32), ratio)


def decided(name: str, options: dict[str, Any], *given: SeenAdapter) -> dict[str, tuple[tuple[int, ...], int]]:
    return {path: (change.kept, change.added) for path, change in build_ranks(name, options).ranks(given).items()}


def test_light_peft_takes_out_adapters_then_ranks():
    given = (seen("a", [9, 9], 0.1), seen("b", [4, 1], 0.4), seen("c", [3, 5], 0.2), seen("d", [2, 6], 0.3))
    # One of four may leave whole, by its ratio and not by its ranks; then the two least important ranks.
    found = decided("light_peft", {"kept": "50%"}, *given)
    assert found == {"a": ((), 0), "b": ((0,), 0), "c": ((0, 1), 0), "d": ((1,), 0)}
    assert decided("light_peft", {"kept": "100%"}, *given).get("a", ((0, 1), 0)) == ((0, 1), 0)


def test_apt_moves_ranks_from_the_less_salient_half_to_the_other():
    given = (seen("a", [9, 9]), seen("b", [4, 1]), seen("c", [3, 5]), seen("d", [2, 6]))
    # Salience: a 9, then c and d 4 (the first of equals), b 2.5. A quarter of 8 ranks moves.
    assert decided("apt", {}, *given) == {"a": ((0, 1), 1), "b": ((0,), 0), "c": ((0, 1), 1), "d": ((1,), 0)}
    # Without anything to move from, and twice the parameters: as published, only the better half changes.
    found = decided("apt", {"kept": "200%", "moved": 0}, *given)
    assert found == {"a": ((0, 1), 4), "b": ((0, 1), 0), "c": ((0, 1), 4), "d": ((0, 1), 0)}
    assert decided("apt", {"kept": "400%", "most": 3}, *given)["a"] == ((0, 1), 4)
    assert decided("apt", {"kept": "400%", "most": 2.75}, *given)["a"] == ((0, 1), 3), "never beyond"
