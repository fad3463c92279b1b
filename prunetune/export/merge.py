"""Adapters into base weights: every tensor of the plain model, one at a time, the live model untouched.

The delta is added in float32 and the sum is cast once. Cutting and writing happen elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from prunetune.core.errors import UnsupportedModelError
from prunetune.export.changed import Changed
from prunetune.export.merge_base import adapts_quantized
from prunetune.model.quantized import FloatLinear, shape_of
from prunetune.model.surgery import base_model

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Source:
    """One tensor of the plain model. ``build`` makes it: float32 where an adapter adds to it, else as stored."""

    name: str
    shape: torch.Size
    origin: Tensor
    adapted: bool
    build: Callable[[], Tensor]

    def same_as(self, other: Source) -> bool:
        """Whether both become the same numbers; builds them only if an adapter is involved."""
        if not (self.adapted or other.adapted):
            return self.origin is other.origin or torch.equal(self.origin, other.origin)
        return self.shape == other.shape and torch.equal(self.build(), other.build())


@torch.no_grad()
def merged_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the plain model's state dict under its stock name, adapters merged in.

    Tensors that the class ties and that are still equal come once; a tie that an adapter has broken (LoRA on
    the embedding alone, say) yields both, see ``ties_hold``. Buffers that are not saved are left out.

    Args:
        model: a PeftModel with its adapters active and not merged, or a plain model; maybe sliced.
        dtype: of the floating point tensors that come out.

    Raises:
        UnsupportedModelError: a quantised base, or an adapter kind that has no exact merge.

    Example:
        >>> save_file(dict(merged_tensors(trainer.model, torch.bfloat16)), path)    # doctest: +SKIP
    """
    for source in untied_sources(model):
        tensor = source.build()
        yield source.name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def untied_sources(model: nn.Module) -> list[Source]:
    """What ``merged_tensors`` will yield, before anything is computed: names and shapes."""
    sources = {source.name: source for source in _walk(base_model(model), "")}
    if ties_hold(model):
        for copy in _ties(model):
            sources.pop(copy, None)
    return list(sources.values())


def ties_hold(model: nn.Module) -> bool:
    """Whether the weights that the model's class ties (embedding and head) are still equal once merged."""
    sources = {source.name: source for source in _walk(base_model(model), "")}
    pairs = [(sources[a], sources[b]) for a, b in _ties(model).items() if a in sources and b in sources]
    return bool(_ties(model)) and all(copy.same_as(origin) for copy, origin in pairs)


def _ties(model: nn.Module) -> dict[str, str]:
    """Tied name -> the name that is saved."""
    return dict(getattr(base_model(model), "all_tied_weights_keys", None) or {})


def _walk(module: nn.Module, prefix: str) -> Iterator[Source]:
    """The module's tensors in definition order, PEFT's wrappers seen through."""
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        yield from _walk(module.modules_to_save[active[0]] if active else module.original_module, prefix)
    elif isinstance(module, LoraLinear | LoraEmbedding) or adapts_quantized(module):
        yield from _adapted(module, prefix)
    elif isinstance(module, Changed):
        yield from _changed(module, prefix)
    elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise UnsupportedModelError(
            f"{prefix.rstrip('.')} is wrapped by {type(module).__name__}, which prunetune cannot merge exactly; "
            "use LoRA (rsLoRA, DoRA, modules_to_save) on linear layers of a 16 or 32 bit base"
        )
    else:
        for name, tensor in _own_tensors(module):
            _refuse_quantised(prefix + name, tensor)
            yield _stored(prefix + name, tensor, module)
        for name, child in module.named_children():
            yield from _walk(child, f"{prefix}{name}.")


def _stored(name: str, tensor: Tensor, module: nn.Module) -> Source:
    """A tensor that no adapter changes."""
    if isinstance(module, FloatLinear) and tensor.is_meta:
        return Source(name, tensor.shape, tensor, True, lambda: module.weight)
    return Source(name, tensor.shape, tensor, False, tensor.detach)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers; the weight that a FloatLinear makes anew is on the meta device."""
    if isinstance(module, FloatLinear):
        yield "weight", torch.empty(shape_of(module), device="meta")
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _refuse_quantised(name: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter) and (tensor.dtype not in _FLOATS or hasattr(tensor, "quant_state")):
        raise UnsupportedModelError(
            f"{name} is stored as {type(tensor).__name__} of {tensor.dtype}: merging into a 4 or 8 bit base would "
            "round twice. Load the base in bfloat16 or float32 (model.dtype) and train the adapters on that."
        )


def _adapted(layer: Any, prefix: str) -> Iterator[Source]:
    """A LoRA layer's weight, with its delta, and bias."""
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear | nn.Embedding) and type(base).__name__ != "Conv1D":
        raise UnsupportedModelError(
            f"{prefix.rstrip('.')} is a {type(base).__name__}: merging into a quantised or custom layer is not "
            "supported. Load the base in bfloat16 or float32 (model.dtype) and train the adapters on that."
        )
    active = _active(layer, prefix)
    for name, tensor in _own_tensors(base):
        _refuse_quantised(prefix + name, tensor)
        if name == "weight" and active:
            yield Source(prefix + name, tensor.shape, tensor, True, lambda: _weight(layer, active))
        elif name == "bias" and any(layer.lora_bias.get(adapter) for adapter in active):
            yield Source(prefix + name, tensor.shape, tensor, True, lambda: _bias(layer, active))
        else:
            yield _stored(prefix + name, tensor, base)


def _changed(layer: Changed, prefix: str) -> Iterator[Source]:
    """A layer's weight with what is left of its delta, and bias."""
    for name, tensor in _own_tensors(layer.base_layer):
        _refuse_quantised(prefix + name, tensor)
        if name == "weight":
            yield Source(prefix + name, tensor.shape, tensor, True, layer.weight)
        else:
            yield Source(prefix + name, tensor.shape, tensor, False, tensor.detach)


def _active(layer: Any, prefix: str) -> list[str]:
    """The adapters that the layer's forward applies and its weight does not hold yet."""
    factors = layer.lora_embedding_A if isinstance(layer, LoraEmbedding) else layer.lora_A
    names = [name for name in layer.active_adapters if name in factors and name not in layer.merged_adapters]
    if layer.disable_adapters:
        return []
    for name in names:
        variant = layer.lora_variant.get(name)
        is_linear_dora = type(variant) is DoraLinearVariant and isinstance(layer, LoraLinear) and len(names) == 1
        if variant is not None and not is_linear_dora:
            raise UnsupportedModelError(
                f"{prefix.rstrip('.')} has an adapter of kind {type(variant).__name__}, which has no exact merge "
                "here; use plain LoRA, rsLoRA, or a single DoRA adapter on linear layers"
            )
        if layer.lora_bias.get(name) and getattr(layer.get_base_layer(), "bias", None) is None:
            raise UnsupportedModelError(
                f"{prefix.rstrip('.')} has no bias that lora_bias could be merged into; train with lora_bias=False"
            )
    return names


@torch.no_grad()
def _weight(layer: Any, active: list[str]) -> Tensor:
    """Base weight plus all deltas, float32, in the base layer's own orientation."""
    weight = layer.get_base_layer().weight.detach().float()
    for adapter in active:
        weight = weight + _delta(layer, adapter).to(weight.device)
        if adapter in layer.lora_variant:
            weight = _dora(layer, adapter, weight)
    return weight


def _delta(layer: Any, adapter: str) -> Tensor:
    """``scaling * B @ A`` in float32."""
    if isinstance(layer, LoraEmbedding):
        a, b = layer.lora_embedding_A[adapter].float(), layer.lora_embedding_B[adapter].float()
        return (b @ a).T * layer.scaling[adapter]
    a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
    delta = (b @ a) * layer.scaling[adapter]
    return delta.T if layer.fan_in_fan_out else delta


def _dora(layer: Any, adapter: str, weight: Tensor) -> Tensor:
    """Rescales each output feature to its learnt magnitude: m * V / ||V|| (arXiv 2402.09353, eq. 5)."""
    magnitude = layer.lora_magnitude_vector[adapter].weight.detach().float()
    axis = 0 if layer.fan_in_fan_out else 1
    factor = magnitude.reshape(-1) / torch.linalg.norm(weight, dim=axis)
    return weight * factor.unsqueeze(axis)


@torch.no_grad()
def _bias(layer: Any, active: list[str]) -> Tensor:
    bias = layer.get_base_layer().bias.detach().float()
    for adapter in active:
        if layer.lora_bias.get(adapter):
            bias = bias + layer.lora_B[adapter].bias.float() * layer.scaling[adapter]
    return bias
