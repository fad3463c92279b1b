"""The judge's numbers against the sliced model's own logits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from prunetune.model import output_judge
from prunetune.model.output_judge import OutputJudge
from prunetune.model.plan import Plan
from prunetune.model.surgery import slice_model
from prunetune.model.units import sites
from tests.contracts.scores import random_rows, world
from tests.support import random_plan, tiny_arch, tiny_model

BATCHES = [torch.tensor([row.input_ids[:8]]) for row in random_rows(4)]


def direct(model, plan: Plan, batches=BATCHES) -> float:
    """KL(dense || sliced), a mean over tokens, from whole softmaxes in float64."""
    small = copy.deepcopy(model)
    slice_model(small, plan)
    total = 0.0
    with torch.no_grad():
        for ids in batches:
            p, q = (m(ids, use_cache=False).logits[0].double().softmax(-1) for m in (model, small))
            total += float((p * (p.log() - q.log())).sum())
    return total / sum(ids.numel() for ids in batches)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_divergence_is_that_of_the_sliced_model(family: str) -> None:
    model, arch = tiny_model(family), tiny_arch(family)
    kinds = ("mlp_channels", "kv_groups")
    judge, plan = OutputJudge(model, sites(arch, kinds), BATCHES), random_plan(arch, kinds)
    found = judge.divergence(plan.kept)
    assert found > 1e-3
    assert abs(found - direct(model, plan)) < 1e-5 * max(1.0, found)
    assert abs(judge.divergence(plan.kept, share=0.5) - direct(model, plan, BATCHES[1::2])) < 1e-5 * max(1.0, found)
    assert judge.divergence({}) == 0.0


def test_layers_before_the_first_change_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arch = tiny_model("gemma3_text"), tiny_arch("gemma3_text")
    judge = OutputJudge(model, sites(arch, ["mlp_channels", "layers"]), BATCHES)
    kept = {"layers.1.mlp_channels": tuple(range(40))}
    runs: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    found = judge.divergence(kept)
    assert set(runs) == {1, 2}
    assert judge.divergence({"layers": (0, 1)}) > 0
    runs.clear()
    monkeypatch.setattr(judge, "_inputs", None)
    assert judge.divergence(kept) == found, "to the bit what the whole model gives"
    assert set(runs) == {0, 1, 2}
    assert len(model.model.layers) == 3


def test_inputs_that_would_not_fit_are_not_kept_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arch = tiny_model(), tiny_arch()
    kept = {"layers": (0, 2)}
    found = OutputJudge(model, sites(arch, ["layers"]), BATCHES).divergence(kept)
    hooked: list[nn.Module] = []
    register = nn.Module.register_forward_pre_hook
    monkeypatch.setattr(
        nn.Module,
        "register_forward_pre_hook",
        lambda self, *args, **kwargs: (hooked.append(self), register(self, *args, **kwargs))[1],
    )
    monkeypatch.setattr(output_judge, "_KEPT_BYTES", 1)
    judge = OutputJudge(model, sites(arch, ["layers"]), BATCHES)
    assert not hooked
    assert judge.divergence(kept) == found


def test_the_model_is_left_without_hooks() -> None:
    model, arch = tiny_model(), tiny_arch()
    judge = OutputJudge(model, sites(arch, ["layers"]), BATCHES)
    judge.divergence({"layers": (0, 2)})
    judge.block_change({"layers": (0, 2)})
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_symmetric_divergence_is_symmetric_and_bounded() -> None:
    model, arch = tiny_model(), tiny_arch()
    judge = OutputJudge(model, sites(arch, ["layers"]), BATCHES)
    found = judge.divergence({"layers": (0,)}, symmetric=True)
    assert 0 < found < np.log(2)


def test_block_change_of_the_dense_model_is_the_calibration_s() -> None:
    of = world()
    batches = [torch.tensor([row.input_ids]) for row in of.rows]
    found = OutputJudge(of.model, sites(of.arch, ["layers"]), batches).block_change({})
    expected = [1 - of.calibration.statistics(layer).cosine for layer in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
