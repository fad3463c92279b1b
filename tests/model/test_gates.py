"""Gates: exact gradients in float32, per-token squares, checkpointing, open gates invisible, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prunetune.model.architecture import describe
from prunetune.model.gates import GateSet, _Gate
from prunetune.model.surgery import base_model
from prunetune.model.units import KINDS, sites
from tests.support import MODEL_TYPES, batch, logits, tiny_model

LORA = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)


def gated(model, kinds=KINDS, squares=False, seed=0):
    """Gates of the given kinds, set to random values in [0.2, 1]."""
    base = base_model(model)
    gates = GateSet(base, sites(describe(base.config), kinds), record_squares=squares)
    gates.attach()
    generator = torch.Generator().manual_seed(seed)
    gates.set({site.name: 0.2 + 0.8 * torch.rand(site.size, generator=generator) for site in gates.sites})
    return gates


def loss_of(model, inputs=None):
    inputs = inputs or batch(2, 9, padding=2)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model(**inputs, labels=labels).loss


def precise_loss(model):
    """In float64 to the end; transformers computes the loss of a float64 model in float32."""
    inputs = batch()
    out = model(**inputs).logits
    return torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())


def assert_all_close(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("block", [1, 2, 4])
def test_one_gate_equals_plain_autograd(block):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(8 // block, generator=generator).requires_grad_()
    weight = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    square = torch.zeros(8 // block)
    out = _Gate.apply(x, gate, block, square)
    (out * weight).sum().backward()
    plain_x, plain_gate = x.detach().clone().requires_grad_(), gate.detach().double().requires_grad_()
    plain = plain_x * plain_gate.repeat_interleave(block)
    (plain * weight).sum().backward()
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(x.grad, plain_x.grad)
    torch.testing.assert_close(gate.grad.double(), plain_gate.grad, atol=1e-6, rtol=1e-6)
    per_token = (x.detach() * weight).reshape(6, 8 // block, block).sum(-1)
    torch.testing.assert_close(square.double(), per_token.square().sum(0), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_in_a_model_equal_finite_differences(model_type):
    model = tiny_model(model_type).double()
    gates = gated(model)
    values = gates.values()
    precise_loss(model).backward()
    gradients = gates.collect().grad
    for name in ("layers", "layers.0.mlp_channels", "layers.1.kv_groups", "layers.2.query_heads"):
        for unit in (0, values[name].numel() - 1):
            moved, step = [], 2.0**-10
            for sign in (-1, 1):
                near = values[name].clone()
                near[unit] += sign * step
                gates.set({**values, name: near})
                with torch.no_grad():
                    moved.append(float(precise_loss(model)))
            slope = (moved[1] - moved[0]) / (2 * step)
            assert gradients[name][unit] == pytest.approx(slope, rel=1e-2, abs=1e-4), (name, unit)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_squares_are_those_of_single_tokens(model_type):
    """One token at a time through the product rule: x * dL/dy summed over a unit's features, squared, summed."""
    model = tiny_model(model_type)
    base_sites = sites(describe(model.config), ("mlp_channels", "kv_groups"))
    gates = gated(model, ("mlp_channels", "kv_groups"), squares=True)
    expected, seen = {}, {}
    for site in base_sites:
        module = model.get_submodule(site.gated[0])

        def keep(module, args, site=site):
            args[0].retain_grad()
            seen[site.name] = args[0]

        module.register_forward_pre_hook(keep)  # after the gate: y = x * gate
    loss_of(model).backward()
    values = gates.values()
    for site in base_sites:
        gate_F = values[site.name].repeat_interleave(site.block)
        product = seen[site.name].grad * seen[site.name].detach() / gate_F
        expected[site.name] = product.reshape(-1, site.size, site.block).sum(-1).square().sum(0)
    assert_all_close(gates.collect().square, expected, atol=1e-9, rtol=1e-4)


def test_squares_and_gradients_add_up_over_micro_batches():
    model = tiny_model()
    gates = gated(model, squares=True)
    values, parts = gates.values(), []
    batches = [batch(2, 9, seed=seed) for seed in (1, 2)]
    for inputs in batches:
        gates.set(values)
        loss_of(model, inputs).backward()
        parts.append(gates.collect())
    gates.set(values)
    for inputs in batches:
        loss_of(model, inputs).backward()
    both = gates.collect()
    for part in ("grad", "square"):
        total = {name: getattr(parts[0], part)[name] + getattr(parts[1], part)[name] for name in both.grad}
        assert_all_close(getattr(both, part), total, atol=1e-6, rtol=1e-5)


def test_evaluation_passes_leave_no_trace():
    model = tiny_model()
    gates = gated(model, squares=True)
    logits(model)
    statistics = gates.collect()
    assert all(not value.any() for part in (statistics.grad, statistics.square) for value in part.values())


def test_set_forgets_what_was_collected():
    model = tiny_model()
    gates = gated(model, squares=True)
    loss_of(model).backward()
    before = gates.collect()
    gates.set({})
    after = gates.collect()
    assert all(not value.any() for part in (after.grad, after.square) for value in part.values())
    assert any(value.any() for value in before.grad.values()), "what was handed out stays"
    assert any(value.any() for value in before.square.values())


def test_gradients_are_reduced_in_float32_in_bfloat16():
    """4099 equal terms: bfloat16 has 8 bits, so it can neither add them up nor say the sum."""
    x = torch.ones(1, 4099, 2, dtype=torch.bfloat16, requires_grad=True)
    for block in (1, 2):
        gate = torch.ones(2 // block, requires_grad=True)
        square = torch.zeros(2 // block)
        _Gate.apply(x, gate, block, square).sum().backward()
        assert gate.grad.dtype == torch.float32
        assert gate.grad.tolist() == [4099.0 * block] * (2 // block)
        assert square.tolist() == [4099.0 * block**2] * (2 // block)
    one = torch.ones(1, requires_grad=True)
    _Gate.apply(torch.ones(1, 1, 4099, dtype=torch.bfloat16), one, 1, None).sum().backward()
    assert one.grad.tolist() == [4099.0]


@pytest.mark.parametrize(("block", "units"), [(1, 256), (64, 4), (1, 1)])
def test_more_tokens_than_are_reduced_at_once(block, units):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1500, 256, generator=generator)
    grad = torch.randn(3, 1500, 256, generator=generator)
    gate, square = torch.ones(units, requires_grad=True), torch.zeros(units)
    _Gate.apply(x, gate, block, square).backward(grad)
    product = (x.double() * grad.double()).reshape(4500, units, 256 // units).sum(-1)
    torch.testing.assert_close(gate.grad.double(), product.sum(0), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(square.double(), product.square().sum(0), atol=1e-3, rtol=1e-4)


def test_bfloat16_models_are_gated_in_their_own_dtype():
    model = tiny_model().to(torch.bfloat16)
    gates = gated(model)
    loss_of(model).backward()
    statistics = gates.collect().grad
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in statistics.values())
    assert model(**batch()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_activation_checkpointing_gives_equal_gradients(model_type, reentrant):
    found = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny_model(model_type), LORA).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            assert base_model(model).model.gradient_checkpointing
        gates = gated(model, squares=True)
        loss_of(model).backward()
        statistics = gates.collect()
        adapters = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((statistics.grad, statistics.square, adapters))
    for plain, checkpointed in zip(*found, strict=True):
        assert_all_close(checkpointed, plain, atol=0, rtol=0)
    assert all(value.any() for value in found[0][0].values())


@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_get_gradients(kind):
    """Without them a closed unit could never come back."""
    model = tiny_model()
    gates = gated(model, (kind,), squares=True)
    gates.set({site.name: torch.zeros(site.size) for site in gates.sites if site.layer < 1})
    loss_of(model).backward()
    statistics = gates.collect()
    name = "layers" if kind == "layers" else f"layers.0.{kind}"
    assert (statistics.grad[name] != 0).all()
    assert (statistics.square[name] > 0).all()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_open_gates_change_no_bit(model_type, squares):
    model = get_peft_model(tiny_model(model_type), LORA)
    plain = loss_of(model)
    plain.backward()
    expected = gradients(model)
    model.zero_grad()
    base = base_model(model)
    gates = GateSet(base, sites(describe(base.config), KINDS), record_squares=squares)
    gates.attach()
    open_ = loss_of(model)
    open_.backward()
    assert torch.equal(open_, plain)
    assert_all_close(gradients(model), expected, atol=0, rtol=0)


def test_detach_leaves_the_model_as_it_was():
    model = tiny_model()
    names = [name for name, _ in model.named_modules()]
    parameters = dict(model.named_parameters())
    before = logits(model)
    gates = gated(model)
    assert [name for name, _ in model.named_modules()] == names, "no module is wrapped or renamed"
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert not torch.equal(logits(model), before)
    gates.detach()
    gates.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model), before)


def test_attaching_twice_gates_once():
    model = tiny_model()
    gates = gated(model, ("mlp_channels",))
    once = logits(model)
    gates.attach()
    assert torch.equal(logits(model), once)


@pytest.mark.parametrize("bad", [torch.ones(63), torch.ones(64, 1), torch.tensor(1.0)])
def test_gates_of_a_wrong_shape_are_refused(bad):
    gates = gated(tiny_model(), ("mlp_channels",))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp_channels must have shape \(64,\)"):
        gates.set({"layers.1.mlp_channels": bad})


def test_values_are_copies():
    model = tiny_model()
    gates = gated(model, ("mlp_channels",))
    given = torch.full((64,), 0.5)
    gates.set({"layers.0.mlp_channels": given})
    given.zero_()
    assert gates.values()["layers.0.mlp_channels"].tolist() == [0.5] * 64


def test_the_layer_gate_covers_the_whole_layer():
    """Closing every layer leaves the embeddings alone: norm and head of what went in."""
    model = tiny_model()
    gates = gated(model, ("layers",))
    gates.set({"layers": torch.zeros(3)})
    with torch.no_grad():
        hidden = model.model.embed_tokens(batch()["input_ids"])
        expected = model.lm_head(model.model.norm(hidden))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_half_open_layer_is_half_as_loud(model_type):
    """Where a norm follows the sublayer, a gate before it would be normalised away."""
    model = tiny_model(model_type, num_hidden_layers=1)
    gates = gated(model, ("layers",))
    added, writer = [], "post_attention_layernorm" if "gemma" in model_type else "self_attn.o_proj"
    writes = model.model.layers[0].get_submodule(writer)
    writes.register_forward_hook(lambda module, args, output: added.append(output))  # after the gate's own hook
    for gate in (1.0, 0.5):
        gates.set({"layers": torch.tensor([gate])})
        logits(model)
    torch.testing.assert_close(added[1], added[0] / 2)
    assert added[0].abs().max() > 0.1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_recomputed_products_change_no_bit_and_are_not_kept(model_type):
    model = get_peft_model(tiny_model(model_type), LORA)

    def step(recompute):
        base = base_model(model)
        sites_ = sites(describe(base.config), ("mlp_channels", "kv_groups"))
        gates = GateSet(base, sites_, record_squares=True, recompute=recompute)
        gates.attach()
        gates.set({site.name: torch.linspace(0, 1, site.size) for site in gates.sites})
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            loss_of(model).backward()
        found = gates.collect()
        gates.detach()
        result = gradients(model), found.grad, found.square
        model.zero_grad()
        return result

    for ours, kept in zip(step(True), step(False), strict=True):
        assert_all_close(ours, kept, atol=0, rtol=0)


def saved_bytes(model, recompute):
    """Bytes that one forward keeps for backward."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    base = base_model(model)
    gates = None
    if recompute is not None:
        gates = GateSet(base, sites(describe(base.config), ("mlp_channels",)), recompute=recompute)
        gates.attach()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        loss_of(model)
    if gates is not None:
        gates.detach()
    return sum(storage.nbytes() for storage in kept.values())


def test_gates_keep_no_second_copy_of_an_mlps_activations():
    model = get_peft_model(tiny_model(), LORA)
    plain, ours, kept = (saved_bytes(model, recompute) for recompute in (None, True, False))
    config = base_model(model).config
    rows = 2 * 9 * config.num_hidden_layers
    assert kept - ours == rows * config.intermediate_size * 2, "x, in bfloat16"
    assert ours - plain <= config.num_hidden_layers * config.intermediate_size * 2, "one row of gates a layer"
