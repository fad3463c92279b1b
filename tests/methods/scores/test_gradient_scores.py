"""Scores from gradients and outputs against direct computations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from prunetune.methods.scores import ModelFacts, ScoreContext, build_score
from prunetune.model.units import sites
from tests.contracts.scores import collected, judge, random_rows, world
from tests.methods.scores.direct import LAYER, group_parts, part

MLP, GROUPS = f"layers.{LAYER}.mlp_channels", f"layers.{LAYER}.kv_groups"
ROLES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
         "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip


def close(found: Tensor, expected: Tensor | list[float]) -> None:
    expected = torch.as_tensor(expected).float()
    torch.testing.assert_close(found, expected, atol=1e-6 * float(expected.abs().max()), rtol=2e-3)


def row_losses(model, row) -> Tensor:
    logits = model(torch.tensor([row.input_ids])).logits[0]
    return torch.stack(
        [-logits[i - 1].log_softmax(0)[row.labels[i]] for i in range(1, len(row.labels)) if row.labels[i] != -100]
    )


def gradients(of, scalar) -> dict[str, Tensor]:
    """role -> d scalar(model) / d W of one layer, by autograd on a copy."""
    model = copy.deepcopy(of.model).requires_grad_(False)
    layer = model.model.layers[LAYER]
    weights = [layer.get_submodule(path).weight.requires_grad_(True) for path in ROLES.values()]
    return dict(zip(ROLES, torch.autograd.grad(scalar(model), weights)))


def unit_sums(of, elements: dict[str, Tensor]) -> tuple[list[float], list[float]]:
    """Sums over what each channel and each group owns."""
    channels = [
        float(elements["gate"][j].sum() + elements["up"][j].sum() + elements["down"][:, j].sum()) for j in range(64)
    ]
    groups = [float(sum(part(elements[r], s, a).sum() for r, s, a in group_parts(of, g))) for g in range(3)]
    return channels, groups


@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_taylor(order: str) -> None:
    of = world()
    losses = [row for row in of.rows if row.targets]
    total = sum(row.targets for row in losses)
    first = gradients(of, lambda model: sum(row_losses(model, row).sum() for row in losses) / total)
    rows = [gradients(of, lambda model, row=row: row_losses(model, row).mean()) for row in losses]
    weights, elements = of.weights(LAYER), {}
    for role, w in weights.items():
        square = sum(row[role].square() for row in rows) / len(rows)
        elements[role] = {
            "first": (w * first[role]).abs(),
            "second": (w * square * w).abs(),
            "mixed": (w * first[role] - 0.5 * w * square * w).abs(),
        }[order]
    scores = collected("taylor", ("mlp_channels", "kv_groups"), options={"order": order}).scores()
    channels, groups = unit_sums(of, elements)
    close(scores[MLP], channels)
    close(scores[GROUPS], groups)


def test_taylor_along_lines_is_the_gate_gradient_of_each() -> None:
    of = world()
    rows = [row for row in of.rows if row.targets]
    total = sum(row.targets for row in rows)
    first = gradients(of, lambda model: sum(row_losses(model, row).sum() for row in rows) / total)
    product = {role: w * first[role] for role, w in of.weights(LAYER).items()}
    expected = [
        float(abs(product["gate"][j].sum()) + abs(product["up"][j].sum()) + abs(product["down"][:, j].sum()))
        for j in range(64)
    ]
    close(collected("taylor", ("mlp_channels",), options={"order": "vector"}).scores()[MLP], expected)


@pytest.mark.parametrize("per", ["token", "row"])
def test_fisher_is_half_the_mean_squared_gate_gradient(per: str) -> None:
    of = world()
    rows = [row for row in of.rows if row.targets]
    total, count = torch.zeros(64), 0
    for row in rows:
        gate = torch.ones(len(row.input_ids), 64, requires_grad=True)
        handle = of.model.model.layers[LAYER].mlp.down_proj.register_forward_pre_hook(
            lambda module, args, gate=gate: (args[0] * gate,)
        )
        losses = row_losses(of.model, row)
        handle.remove()
        [slope] = torch.autograd.grad(losses.sum() if per == "token" else losses.mean(), gate)
        total += slope.square().sum(0) if per == "token" else slope.sum(0).square()
        count += row.targets if per == "token" else 1
    close(collected("fisher", ("mlp_channels",), options={"per": per}).scores()[MLP], total / (2 * count))


def test_nirvana_is_first_order_in_the_highest_logits() -> None:
    of = world()

    def output(model) -> Tensor:
        highest = [model(torch.tensor([row.input_ids])).logits[0].max(dim=0).values for row in of.rows]
        return torch.stack(highest).mean()

    slopes = gradients(of, output)
    channels, groups = unit_sums(of, {role: (w * slopes[role]).abs() for role, w in of.weights(LAYER).items()})
    score = collected("nirvana", ("mlp_channels", "kv_groups"))
    close(score.scores()[MLP], channels)
    close(score.scores()[GROUPS], groups)
    assert score.balance == 3.36


def test_nirvana_takes_the_draw_whose_cut_costs_least() -> None:
    of, seen = world(), []
    context = ScoreContext(of.arch, sites(of.arch, ["mlp_channels"]), 0)
    score = build_score("nirvana", {"draws": 3}, context)

    def price(scores) -> float:
        seen.append(scores)
        return [0.5, 0.1, 0.7][len(seen) - 1]

    of.model.requires_grad_(False)
    score.collect(ModelFacts(of.model, lambda number: random_rows(3, seed=number), lambda: judge(of, []), price))
    assert torch.equal(score.scores()[MLP], seen[1][MLP])
    assert not torch.equal(seen[0][MLP], seen[1][MLP])
    assert score.priced
    assert not build_score("nirvana", {}, context).priced


def test_output_divergence_is_the_greedy_order() -> None:
    """Against removal done by hand: a layer that writes nothing is a layer that is gone."""
    of = world()
    rows = [torch.tensor([row.input_ids]) for row in random_rows(4, seed=9)]

    def distributions(gone: list[int]) -> list[Tensor]:
        model = copy.deepcopy(of.model)
        for index in gone:
            model.model.layers[index].self_attn.o_proj.weight.data.zero_()
            model.model.layers[index].mlp.down_proj.weight.data.zero_()
        with torch.no_grad():
            return [model(ids).logits[0].double().softmax(-1) for ids in rows]

    def moved(gone: list[int]) -> float:
        total = 0.0
        for p, q in zip(distributions([]), distributions(gone)):
            m = (p + q) / 2
            total += float((p * (p / m).log() + q * (q / m).log()).sum()) / 2
        return total / sum(ids.numel() for ids in rows)

    first = min(range(3), key=lambda layer: moved([layer]))
    second = min((layer for layer in range(3) if layer != first), key=lambda layer: moved([first, layer]))
    scores = collected("output_divergence", ("layers",), options={"depth": 1}).scores()["layers"]
    assert scores.argsort().tolist()[:2] == [first, second]
    found = judge(of, ["layers"]).divergence({"layers": [i for i in range(3) if i != first]}, symmetric=True)
    assert math.isclose(found, moved([first]), rel_tol=1e-3)
