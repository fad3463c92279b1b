"""APT: salience and kurtosis by hand, closed units decay, a unit with outliers survives."""

from __future__ import annotations

import pytest
import torch

from prunetune.config.presets import PhaseSteps
from prunetune.methods.masks import build_mask
from prunetune.methods.masks.apt import kurtosis
from prunetune.model.gates import GateStatistics
from tests.contracts.masks import ALL_KINDS, context, with_adapters

PHASES = PhaseSteps(4, 44, 60)


def make(units=("mlp_channels", "kv_groups"), **options):
    return build_mask("apt", options, with_adapters(context(units, PHASES)))


def flat(mask, value=1.0):
    return GateStatistics({site.name: torch.full((site.size,), value) for site in mask.sites}, {})


def test_kurtosis_equals_a_direct_computation():
    mask = make(ALL_KINDS)
    found = kurtosis(mask.context.adapters)
    by_role = {linear.role: linear.weight().double() for linear in mask.context.adapters.linears if linear.layer == 1}

    def by_hand(values):
        centred = values - values.mean()
        return centred.pow(4).mean() / centred.square().mean() ** 2 - 3

    channels = torch.stack([by_hand(by_role["down"][:, channel]) for channel in range(64)])
    groups = torch.stack([by_hand(by_role["o"][:, 16 * group : 16 * group + 16].flatten()) for group in range(3)])
    heads = torch.stack([by_hand(by_role["o"][:, 8 * head : 8 * head + 8].flatten()) for head in range(6)])
    whole = by_hand(torch.cat([by_role["o"].flatten(), by_role["down"].flatten()]))
    torch.testing.assert_close(found["layers.1.mlp_channels"].double(), channels, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["layers.1.kv_groups"].double(), groups, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["layers.1.query_heads"].double(), heads, rtol=1e-4, atol=1e-4)
    assert float(found["layers"][1]) == pytest.approx(float(whole), rel=1e-4)


def test_salience_is_the_running_mean_of_squared_gate_times_gradient():
    mask = make(kurtosis=False)
    mask.after_backward(0, flat(mask, 2.0))
    state = mask.state_dict()
    state["gate.layers.0.mlp_channels"][3] = 0.0
    mask.load_state_dict(state)
    mask.after_backward(1, flat(mask, 3.0))
    mean = mask.state_dict()["mean.layers.0.mlp_channels"]
    assert float(mean[0]) == pytest.approx(0.85 * 0.15 * 4 + 0.15 * 9)
    assert float(mean[3]) == pytest.approx(0.85 * 0.15 * 4), "a closed unit's salience decays"


def test_sixteen_events_on_the_way_unless_told_otherwise():
    assert make().refresh == 2, "32 steps of ramp"
    assert make(refresh=5).refresh == 5


def test_kurtosis_is_looked_at_whenever_it_is_decided():
    """Also by the last decision of a search that is shorter than ``refresh``."""
    mask = make(refresh=50)
    for step in range(PHASES.freeze):
        mask.after_backward(step, flat(mask))
    assert any(bool(t.any()) for name, t in mask.state_dict().items() if name.startswith("outliers."))


def test_a_unit_whose_weights_have_outliers_survives_only_with_the_kurtosis():
    kept = {}
    for with_it in (True, False):
        mask = make(("mlp_channels",), kurtosis=with_it)
        [down] = [x for x in mask.context.adapters.linears if (x.layer, x.role) == (0, "down")]
        with torch.no_grad():
            down.module.base_layer.weight[7, 63] = 30.0
        for step in range(PHASES.freeze):
            mask.after_backward(step, flat(mask))
        kept[with_it] = 63 in mask.plan({}).kept["layers.0.mlp_channels"]
    assert kept == {True: True, False: False}
