"""Gates in front of quantised linears: their gradients, the recomputed product, checkpointing, and what they close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from prunetune.model.architecture import describe
from prunetune.model.gates import GateSet
from prunetune.model.quantized import FloatLinear, float_linears, in_floats, keep_format, weight_of
from prunetune.model.surgery import Surgery, base_model, slice_model
from prunetune.model.units import sites
from tests.quantized.quantized_runs import KINDS, load, quantized_folder
from tests.support import batch, hard_gates, random_plan

UNITS = ("mlp_channels", "kv_groups")
SHAPE = {"layers": 3, "kv_groups": 2, "queries_per_group": 2, "mlp_channels": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_folder(tmp_path_factory.mktemp("base"))


def adapted(folder: Path, kind: str) -> Any:
    """A quantised base with adapters that do something."""
    torch.manual_seed(0)
    model = load(folder, kind)
    keep_format(model)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()


def gradients(model: Any, *, recompute: bool = False, checkpointing: bool = False) -> tuple[dict[str, Tensor], ...]:
    """Gate gradients, their per-token squares, and the adapters' gradients, with gates that are half open."""
    base = base_model(model)
    gates = GateSet(base, sites(describe(base.config), UNITS), record_squares=True, recompute=recompute)
    gates.attach()
    draw = torch.Generator().manual_seed(3)
    gates.set({site.name: 0.5 + 0.5 * torch.rand(site.size, generator=draw) for site in gates.sites})
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = batch(2, 11)["input_ids"]
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    found = gates.collect()
    gates.detach()
    if checkpointing:
        base.gradient_checkpointing_disable()
    trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found.grad, found.square, trained


@pytest.mark.parametrize("kind", KINDS)
def test_gates_see_what_they_see_on_the_same_weights_in_floats(folder: Path, kind: str) -> None:
    model = adapted(folder, kind)
    live = gradients(model)
    with in_floats(model):
        plain = gradients(model)
    for found, wanted in zip(live, plain):
        assert found.keys() == wanted.keys()
        assert found
        for name, value in wanted.items():
            assert bool(value.any())
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["recompute", "checkpointing"])
def test_recomputing_changes_no_gradient(folder: Path, kind: str, how: str) -> None:
    model = adapted(folder, kind)
    for found, wanted in zip(gradients(model, **{how: True}), gradients(model)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_gate_gradient_is_the_loss_slope(folder: Path) -> None:
    model = adapted(folder, "nf4")
    base, ids = base_model(model), batch(2, 11)["input_ids"]
    with in_floats(model):
        model.double()
        gates = GateSet(base, sites(describe(base.config), UNITS))
        gates.attach()
        site = gates.sites[0]

        def loss(gate: Tensor) -> Tensor:
            gates.set({site.name: gate})
            logits_BSV = model(input_ids=ids).logits  # transformers' own loss would round them to float32
            return nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

        loss(torch.ones(site.size)).backward()
        slope = gates.collect().grad[site.name]
        unit, step = int(slope.abs().argmax()), 1e-4
        moved = torch.ones(site.size)
        moved[unit] -= step
        with torch.no_grad():
            measured = float(loss(torch.ones(site.size)) - loss(moved)) / step
        gates.detach()
        model.float()
    live = gradients_open(adapted(folder, "nf4"), site.name)
    assert measured == pytest.approx(float(slope[unit]), rel=1e-2)
    assert float(live[unit]) == pytest.approx(measured, rel=1e-2)


def gradients_open(model: Any, site: str) -> Tensor:
    """A site's gate gradients of the live quantised model with all gates open."""
    base, ids = base_model(model), batch(2, 11)["input_ids"]
    gates = GateSet(base, sites(describe(base.config), UNITS), recompute=True)
    gates.attach()
    model(input_ids=ids, labels=ids).loss.backward()
    return gates.collect().grad[site]


@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_equal_the_cut_on_dequantised_weights(folder: Path, kind: str) -> None:
    model = adapted(folder, kind).eval()
    base = base_model(model)
    arch = describe(base.config)
    plan = random_plan(arch, UNITS, seed=3, **SHAPE)
    gates = GateSet(base, sites(arch, UNITS))
    gates.attach()
    gates.set(hard_gates(arch, gates.sites, plan))
    masked = exact_logits(model)
    gates.detach()
    dense = {path: weight_of(base.get_submodule(f"{path}.base_layer")) for path in Surgery(arch, plan).cuts}
    slice_model(model, plan)
    assert torch.allclose(exact_logits(model), masked, atol=1e-9, rtol=0)
    for path, cut in Surgery(arch, plan).cuts.items():
        linear = base.get_submodule(f"{path}.base_layer")
        assert isinstance(linear, FloatLinear)
        assert torch.equal(linear.weight, cut.apply("weight", dense[path]))
        assert (linear.out_features, linear.in_features) == linear.weight.shape
    assert len(float_linears(model)) == len(dense)


def exact_logits(model: Any) -> Tensor:
    """Float64 logits, with gates in force."""
    with in_floats(model), torch.no_grad():
        model.double()
        found = model(**batch(2, 9)).logits
        model.float()
    return found
