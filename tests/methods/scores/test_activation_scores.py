"""Scores from weights and activations against direct computations on one layer of a small model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.contracts.scores import collected, world
from tests.methods.scores.direct import LAYER, group_parts, part, recorded

MLP, GROUPS, HEADS = (f"layers.{LAYER}.{kind}" for kind in ("mlp_channels", "kv_groups", "query_heads"))


def close(found: Tensor, expected: Tensor | np.ndarray | list[float]) -> None:
    torch.testing.assert_close(found, torch.as_tensor(np.asarray(expected)).float(), atol=1e-5, rtol=1e-4)


def test_wanda_is_weight_times_input_norm() -> None:
    of = world()
    x, weights = recorded(of), of.weights(LAYER)
    scores = collected("wanda", ("mlp_channels", "kv_groups")).scores()
    norm = x["down"].square().mean(0).sqrt()
    close(scores[MLP], [float((weights["down"][:, j].abs() * norm[j]).mean()) for j in range(64)])
    norm = x["o"].square().mean(0).sqrt()
    expected = [float((weights["o"][:, g * 16 : (g + 1) * 16].abs() * norm[g * 16 : (g + 1) * 16]).mean(0).sum())
                for g in range(3)]  # fmt: skip
    close(scores[GROUPS], expected)


@pytest.mark.parametrize("power", [1, 2])
def test_magnitude_sums_over_everything_a_unit_owns(power: int) -> None:
    of = world()
    weights = of.weights(LAYER)
    scores = collected("magnitude", ("mlp_channels", "kv_groups"), options={"power": power}).scores()
    channel = [
        float(
            sum(line.abs().pow(power).sum() for line in (weights["gate"][j], weights["up"][j], weights["down"][:, j]))
        )
        for j in range(64)
    ]
    close(scores[MLP], channel)
    close(
        scores[GROUPS],
        [float(sum(part(weights[r], s, a).abs().pow(power).sum() for r, s, a in group_parts(of, g))) for g in range(3)],
    )
    whole = collected("magnitude", ("layers",), options={"power": power}).scores()["layers"]
    close(whole[LAYER], float(sum(w.abs().pow(power).sum() for w in weights.values())))
    alone = collected("magnitude", ("mlp_channels",), options={"power": power, "of": "consumer"}).scores()[MLP]
    close(alone, weights["down"].abs().pow(power).sum(0))


def test_peak_to_peak_is_the_range_of_gate_and_up_rows() -> None:
    weights = world().weights(LAYER)
    expected = [
        sum(float(weights[role][j].max()) + abs(float(weights[role][j].min())) for role in ("gate", "up"))
        for j in range(64)
    ]
    close(collected("peak_to_peak", ("mlp_channels",)).scores()[MLP], expected)


def test_fluctuation_is_the_standardised_variance_times_column_norm() -> None:
    of = world()
    x, weights = recorded(of), of.weights(LAYER)
    scores = collected("fluctuation", ("mlp_channels", "kv_groups", "query_heads")).scores()

    def standard(role: str) -> np.ndarray:
        raw = np.var(x[role].double().numpy(), axis=0) * np.square(weights[role].double().numpy()).sum(0)
        return (raw - raw.mean()) / raw.std(ddof=1)

    # All scores are moved by one number: differences and the common least are what is fixed.
    moved = float(scores[MLP][0]) - standard("down")[0]
    close(scores[MLP], standard("down") + moved)
    close(scores[GROUPS], standard("o").reshape(3, 16).mean(1) + moved)
    close(scores[HEADS], standard("o").reshape(6, 8).mean(1) + moved)
    assert min(float(values.min()) for values in scores.values()) == 0.0


def test_fluctuation_metrics_and_sites_without_any() -> None:
    of = world()
    x = recorded(of)["down"]
    alone = collected("fluctuation", ("mlp_channels",), options={"metric": "ifv"}).scores()[MLP]
    assert torch.equal(alone.argsort(), x.var(0).argsort())
    norm = collected("fluctuation", ("mlp_channels",), options={"metric": "wifn"}).scores()[MLP]
    assert torch.equal(norm.argsort(), (of.weights(LAYER)["down"].abs().mean(0) * x.square().mean(0).sqrt()).argsort())


def test_amp_is_what_a_unit_adds_to_the_residual_stream() -> None:
    of = world()
    x, weights = recorded(of), of.weights(LAYER)
    scores = collected("amp", ("mlp_channels", "kv_groups", "query_heads")).scores()
    channel = [float(torch.outer(x["down"][:, j], weights["down"][:, j]).abs().sum(1).mean()) for j in range(64)]
    close(scores[MLP], channel)
    for name, width in ((HEADS, 8), (GROUPS, 16)):
        spans = [slice(u * width, (u + 1) * width) for u in range(48 // width)]
        close(scores[name], [float((x["o"][:, s] @ weights["o"][:, s].T).abs().sum(1).mean()) for s in spans])


def test_cfsp_shares_are_of_rows() -> None:
    of = world()
    x, weights = recorded(of)["down"], of.weights(LAYER)
    norm = x.square().mean(0).sqrt()
    matrices = [weights["down"].abs() * norm, weights["up"].abs().T, weights["gate"].abs().T]
    fine = sum((m / m.sum(1, keepdim=True)).mean(0) for m in matrices) * norm
    found = collected("cfsp", ("mlp_channels",), options={"sharpness": 0}).scores()[MLP]
    close(found, fine / fine.mean())
    # What the published normalisation by columns comes to: the input norm alone, whatever the weights are.
    columns = sum((m / m.sum(0, keepdim=True)).mean(0) for m in matrices)
    torch.testing.assert_close(columns, torch.full((64,), 3 / 48))


def test_cfsp_weighs_layers_by_their_angle() -> None:
    of = world()
    plain, weighed = (collected("cfsp", ("mlp_channels",), options={"sharpness": s}).scores() for s in (0, 1))
    factors = [float((weighed[f"layers.{i}.mlp_channels"] / plain[f"layers.{i}.mlp_channels"])[0]) for i in range(3)]
    angles = [of.calibration.statistics(i).angle for i in range(3)]
    assert np.argsort(factors).tolist() == np.argsort(angles).tolist()
    assert abs(sum(factors) / 3 - 1) < 1e-5


def test_block_influence_is_one_minus_cosine() -> None:
    of = world()
    x = recorded(of)
    cosines = [
        float(b @ a) / (float(b.norm()) * float(a.norm())) for b, a in zip(x["before"].double(), x["after"].double())
    ]
    close(collected("block_influence", ("layers",)).scores()["layers"][LAYER], 1 - sum(cosines) / len(cosines))
    angle = sum(math.acos(cosine) / math.pi for cosine in cosines) / len(cosines)
    assert abs(of.calibration.statistics(LAYER).angle - angle) < 1e-5


def test_wanda_of_a_layer_is_the_sum_of_its_parts() -> None:
    parts = collected("wanda", ("mlp_channels", "kv_groups")).scores()
    whole = collected("wanda", ("layers",)).scores()["layers"]
    close(whole[LAYER], float(parts[MLP].double().sum() + parts[GROUPS].double().sum()))
