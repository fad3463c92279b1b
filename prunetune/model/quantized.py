"""What is about bitsandbytes: recognising its linears, their weights as numbers, quantising anew, and linears that
stand in for them with plain numbers. When a base is quantised again, and from what, is in source.py.

bitsandbytes is an extra: it is imported only where a weight is quantised, so that everything here also works on
models without it. Legend: O output features, I input features.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.core.errors import UnsupportedModelError

# The largest relative distance (Frobenius norms) between a weight and what a quantiser makes of it that can be
# rounding: 4-bit codes in blocks of 64 give 0.09 to 0.15 on real weights of any scale, unrelated weights about 1.4.
LARGEST_ERROR = 0.25


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a bitsandbytes linear that stores its weight in 4 or 8 bit (PEFT layers are not)."""
    weight = module._parameters.get("weight")
    kind = type(weight).__name__
    return kind == "Params4bit" or (kind == "Int8Params" and weight is not None and weight.dtype == torch.int8)


def quantized_linears(model: nn.Module) -> dict[str, Any]:
    """Every bitsandbytes linear of a model by its path; for a PeftModel, paths end in ``base_layer``."""
    return {path: module for path, module in model.named_modules() if is_quantized(module)}


def kind_of(layer: Any) -> str:
    """``nf4``, ``fp4`` or ``int8``."""
    return "int8" if type(layer.weight).__name__ == "Int8Params" else str(layer.weight.quant_type)


def shape_of(layer: Any) -> torch.Size:
    """(O, I) of a linear's weight, however it is stored."""
    if is_quantized(layer) or isinstance(layer, FloatLinear):
        return torch.Size((layer.out_features, layer.in_features))
    shape: torch.Size = layer.weight.shape
    return shape


def weight_of(layer: Any) -> Tensor:
    """(O, I) weight of a linear as it acts: dequantised to float32, or the stored tensor if it is not quantised."""
    weight = layer.weight
    if not is_quantized(layer):
        return weight.detach()
    if kind_of(layer) == "int8":
        scale_O = weight.SCB if weight.SCB is not None else layer.state.SCB  # it moves at the first forward
        return weight.data.float() * (scale_O.float()[:, None] / 127)
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedModelError(
            "this 4-bit model was evaluated on the CPU before: bitsandbytes then rounds its scales for good and cuts "
            "the gradients of later training. Load the model again"
        )
    exact = copy.copy(state)  # in float32 whatever the dtype it came from: scale times code, not rounded
    exact.dtype = torch.float32
    return dequantize_4bit(weight.data, exact)


def dtype_of(layer: Any) -> torch.dtype:
    """The dtype that a quantised linear's weight had when it was quantised, or the weight's own."""
    if not is_quantized(layer):
        return layer.weight.dtype
    return torch.float16 if kind_of(layer) == "int8" else layer.weight.quant_state.dtype


def size_bytes(layer: Any) -> int:
    """Bytes of a linear's weight as it is stored, scales included."""
    weight = layer.weight
    tensors = [weight.data]
    if is_quantized(layer) and kind_of(layer) == "int8":
        tensors.append(weight.SCB if weight.SCB is not None else layer.state.SCB)
    elif is_quantized(layer):
        state = weight.quant_state
        tensors += [state.absmax, state.code]
        tensors += [state.state2.absmax, state.state2.code] if state.nested else []
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def quantize_like(layer: Any, weight_OI: Tensor, bias_O: nn.Parameter | None = None) -> Any:
    """A new linear with another weight (of any shape), quantised as ``layer`` is and on its device.

    Args:
        layer: a bitsandbytes linear; says kind, block size, double quantisation and compute dtype.
        weight_OI: the weight, of any floating dtype. bias_O: the bias as it is to be.

    Raises:
        UnsupportedModelError: this machine's kernels do not give back such a weight.
    """
    import bitsandbytes as bnb

    rows, columns = weight_OI.shape
    old, device = layer.weight, layer.weight.device
    weight_OI = weight_OI.to(dtype_of(layer)).contiguous()
    if kind_of(layer) == "int8":
        new = bnb.nn.Linear8bitLt(columns, rows, False, False, threshold=layer.state.threshold, device="meta")
        # It is quantised on its way from the CPU.
        new.weight = bnb.nn.Int8Params(weight_OI.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    else:
        require_sound(columns, old.blocksize, device)
        new = bnb.nn.Linear4bit(columns, rows, False, layer.compute_dtype, device="meta")
        new.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu
        new.weight = bnb.nn.Params4bit(
            weight_OI,
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=new,
        ).to(device)
        new.quant_storage = old.quant_storage
    new.bias = bias_O
    return new.train(layer.training)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted|| in float32; 0 for two zeros."""
    wanted = wanted.to(found.device, torch.float32)
    distance, norm = float((found.float() - wanted).norm()), float(wanted.norm())
    return distance / norm if norm else (float("inf") if distance else 0.0)


def require_sound(columns: int, block: int, device: torch.device) -> None:
    """Raises UnsupportedModelError if 4-bit weights with so many input features are read back wrongly here.

    bitsandbytes 0.50.2 does so on CPUs with AVX-512 for widths that are a multiple of 16 but not of the block: the
    scales of other blocks are taken.
    """
    if not _reads_back(columns, block, device):
        raise UnsupportedModelError(
            f"bitsandbytes {importlib.metadata.version('bitsandbytes')} reads 4-bit weights with {columns} input "
            f"features back wrongly on this {device.type} (it takes the scales of other blocks). Take widths that are "
            f"multiples of {block} (target.align: {block}), model.quantize: int8, or a GPU"
        )


@functools.cache
def _reads_back(columns: int, block: int, device: torch.device) -> bool:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    # One value per block: each is its block's largest, so it must come back to the bit.
    weight_OI = torch.arange(block * columns, device=device).div(block, rounding_mode="floor").add(1).float()
    weight_OI = weight_OI.reshape(block, columns)
    codes, state = quantize_4bit(weight_OI, blocksize=block, quant_type="nf4")
    return torch.equal(dequantize_4bit(codes, state), weight_OI)


def keep_format(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights when a CPU with bfloat16 arithmetic evaluates the model.

    Repacking rounds the scales to bfloat16, for good, and no gradient passes a repacked linear: training after an
    evaluation would go on with wrong gradients.
    """
    for layer in quantized_linears(model).values():
        if kind_of(layer) != "int8":
            layer.support_avx512bf16_for_cpu = False


class FloatLinear(nn.Linear):
    """Stands in for a quantised linear: the same function with plain numbers, in whatever dtype its input has.

    It owns no parameter and makes its weight anew in every pass, so a model full of them needs no second copy.

    Args:
        layer: the bitsandbytes linear.
        build: makes the weight; default: the layer's own, dequantised.
        shape: (O, I) of that weight; default: the layer's.
    """

    def __init__(self, layer: Any, build: Callable[[], Tensor] | None = None, shape: torch.Size | None = None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape or shape_of(layer)
        # In a tuple, so that it is no submodule: its codes are no numbers that anybody may cast.
        self.replaced: tuple[Any] = (layer,)
        self.build = build or functools.partial(weight_of, layer)
        self.bias = layer.bias
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(O, I), made anew."""
        return self.build()

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        bias_O = None if self.bias is None else self.bias.to(x)
        return nn.functional.linear(x, self.weight.to(x), bias_O)


def float_linears(model: nn.Module) -> dict[str, FloatLinear]:
    """Every FloatLinear of a model by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FloatLinear)}


def count_parameters(model: nn.Module) -> int:
    """Numbers that make up a model: its parameters, and the weights that FloatLinears stand for."""
    standing = sum(shape_of(linear).numel() for linear in float_linears(model).values())
    return standing + sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def in_floats(model: nn.Module, weights: Mapping[str, Callable[[], Tensor]] | None = None) -> Iterator[None]:
    """The model with a FloatLinear in place of every quantised linear; the very same layers are put back afterwards.

    Args:
        model: any; nothing happens to one that is not quantised.
        weights: path of a quantised linear (as in ``quantized_linears``) -> makes another weight for it.
    """
    layers = quantized_linears(model)
    try:
        for path, layer in layers.items():
            model.set_submodule(path, FloatLinear(layer, (weights or {}).get(path)))
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)
