"""Quantised linears as numbers: what they hold, what stands in for them, what this machine's kernels make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from torch import nn
from transformers import AutoModelForCausalLM

from prunetune.core.errors import UnsupportedModelError
from prunetune.model import quantized
from prunetune.model.quantized import (
    LARGEST_ERROR,
    FloatLinear,
    count_parameters,
    in_floats,
    is_quantized,
    keep_format,
    kind_of,
    quantize_like,
    quantized_linears,
    relative_error,
    require_sound,
    shape_of,
    size_bytes,
    weight_of,
)
from tests.quantized.quantized_runs import KINDS, load, quantized_folder, settings
from tests.support import count, logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_folder(tmp_path_factory.mktemp("base"), mlp_bias=True)


def down(model: Any) -> Any:
    return model.model.layers[1].mlp.down_proj


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_what_the_layer_multiplies_with(folder: Path, kind: str) -> None:
    layer = down(load(folder, kind))
    assert is_quantized(layer)
    assert kind_of(layer) == kind
    assert shape_of(layer) == (64, 192)
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    # In training, so that int8 does not round the inputs too.
    found = layer.train()(x)
    torch.testing.assert_close(found, x @ weight_of(layer).T + layer.bias, atol=1e-5, rtol=1e-5)


def test_four_bit_weight_is_code_times_scale(folder: Path) -> None:
    model = load(folder, "nf4")
    layer = down(model)
    state = layer.weight.quant_state
    scales = quantized_scales(state)
    codes = layer.weight.data.flatten()
    nibbles = torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()
    wanted = get_4bit_type("nf4", device="cpu")[nibbles] * scales.repeat_interleave(64)
    torch.testing.assert_close(weight_of(layer).flatten(), wanted, atol=1e-7, rtol=1e-6)


def quantized_scales(state: Any) -> torch.Tensor:
    """The scale of every block, from its own codes: double quantisation keeps them in 8 bit around their mean."""
    inner = state.state2
    return inner.code[state.absmax.long()] * inner.absmax.repeat_interleave(256)[: len(state.absmax)] + state.offset


def test_codes_may_be_kept_as_floats(folder: Path) -> None:
    """bnb_4bit_quant_storage, which engines that spread parameters ask for: the bytes are the same."""
    kind = settings("nf4")
    kind.bnb_4bit_quant_storage = torch.bfloat16
    stored = AutoModelForCausalLM.from_pretrained(folder, quantization_config=kind, dtype=torch.float32)
    plain = load(folder, "nf4")
    assert down(stored).weight.dtype == torch.bfloat16
    assert torch.equal(weight_of(down(stored)), weight_of(down(plain)))
    other = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    again = quantize_like(down(stored), other)
    assert again.weight.dtype == torch.bfloat16
    assert torch.equal(weight_of(again), weight_of(quantize_like(down(plain), other)))


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.093), ("fp4", 0.123), ("int8", 0.0067)])
def test_quantising_the_same_weight_gives_the_same_codes(folder: Path, kind: str, error: float) -> None:
    source = down(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).weight
    layer = down(load(folder, kind))
    again = quantize_like(layer, source.detach(), layer.bias)
    assert torch.equal(weight_of(again), weight_of(layer))
    assert again.bias is layer.bias
    assert relative_error(weight_of(layer), source.detach()) == pytest.approx(error, rel=0.05)
    assert relative_error(weight_of(layer), torch.randn(64, 192)) > 4 * LARGEST_ERROR
    narrow = quantize_like(layer, source.detach()[:, :128])
    assert shape_of(narrow) == (64, 128)
    assert relative_error(weight_of(narrow), source.detach()[:, :128]) == pytest.approx(error, rel=0.05)


def test_sizes_count_scales(folder: Path) -> None:
    weights = 64 * 192
    assert size_bytes(down(load(folder, "int8"))) == weights + 64 * 4
    # A byte a block, one scale for the 192 blocks, and both tables of codes.
    assert size_bytes(down(load(folder, "nf4"))) == weights // 2 + weights // 64 + 4 + (16 + 256) * 4
    assert size_bytes(nn.Linear(4, 3, dtype=torch.bfloat16)) == 24


@pytest.mark.parametrize("kind", KINDS)
def test_stand_ins_compute_the_same_and_leave_no_trace(folder: Path, kind: str) -> None:
    model = load(folder, kind).train()
    dense = count(AutoModelForCausalLM.from_pretrained(folder))
    before, wanted = quantized_linears(model), logits(model)
    with in_floats(model):
        assert not quantized_linears(model)
        assert all(parameter.is_floating_point() for parameter in model.parameters())
        assert count_parameters(model) == dense
        torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=2e-5)
        x = torch.randn(2, 192, dtype=torch.float64)
        exact = x @ down(model).weight.double().T + down(model).bias.double()
        assert torch.equal(down(model)(x), exact), "it computes in its input's dtype"
    after = quantized_linears(model)
    assert after.keys() == before.keys()
    assert all(after[path] is before[path] for path in before)
    assert torch.equal(logits(model), wanted)


def test_other_weights_can_stand_in(folder: Path) -> None:
    model, dense = load(folder, "nf4").eval(), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sources = {path: (lambda path=path: dense.get_submodule(path).weight) for path in quantized_linears(model)}
    with in_floats(model, sources):
        torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)


def test_evaluating_does_not_change_training(folder: Path) -> None:
    """bitsandbytes repacks 4-bit weights when a CPU with bfloat16 arithmetic evaluates, and then cuts gradients."""
    model = load(folder, "nf4")
    keep_format(model)
    before = {path: weight_of(layer) for path, layer in quantized_linears(model).items()}
    logits(model.eval())
    assert all(torch.equal(weight_of(layer), before[path]) for path, layer in quantized_linears(model).items())
    x = torch.randn(2, 192, requires_grad=True)
    down(model.train())(x).sum().backward()
    torch.testing.assert_close(x.grad, weight_of(down(model)).sum(0).expand(2, 192), atol=1e-5, rtol=1e-5)


def test_a_repacked_model_is_refused(folder: Path) -> None:
    layer = down(load(folder, "nf4"))
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedModelError, match="Load the model again"):
        weight_of(layer)


@pytest.mark.parametrize("columns", [40, 48, 64, 112, 128, 192])
def test_unsound_kernels_are_found(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's kernels do: a width is called sound only if random weights come back as code x scale."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(1))
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    nibbles = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten().long()
    wanted = get_4bit_type("nf4", device="cpu")[nibbles] * state.absmax.repeat_interleave(64)[: weight.numel()]
    sound = torch.allclose(dequantize_4bit(codes, state).flatten(), wanted, atol=1e-6)
    if sound:
        require_sound(columns, 64, torch.device("cpu"))
    else:
        with pytest.raises(UnsupportedModelError, match=f"{columns} input features.*multiples of 64"):
            require_sound(columns, 64, torch.device("cpu"))
    if columns % 64 == 0:
        assert sound, "the widths that the message advises"
    monkeypatch.setattr(quantized, "_reads_back", lambda *_: False)
    with pytest.raises(UnsupportedModelError, match="reads 4-bit weights"):
        require_sound(columns, 64, torch.device("cpu"))


def test_plain_linears_are_left_alone() -> None:
    linear = nn.Linear(4, 3)
    assert not is_quantized(linear)
    assert weight_of(linear).data_ptr() == linear.weight.data_ptr()
    model = nn.Sequential(linear)
    with in_floats(model):
        assert model[0] is linear
    assert not isinstance(linear, FloatLinear)
