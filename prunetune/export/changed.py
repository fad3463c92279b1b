"""A live model whose adapters are replaced by what is left of their deltas, for measuring, merging and verifying it.

What is left is decided by the delta methods; merging is in merge.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional

from prunetune.core.errors import UnsupportedModelError
from prunetune.export.merge_base import adapts_quantized
from prunetune.model.deltas import Delta, LowRank, Place
from prunetune.model.surgery import Surgery, base_model


class Changed(nn.Module):
    """A linear or embedding plus a dense delta of its weight, in place of its adapters.

    Args:
        layer: PEFT's layer around it. delta: (m, n) float32.
    """

    delta: Tensor
    # What the delta is divided by; it may be set anew while the layer is in use.
    divisor = 1.0

    def __init__(self, layer: Any, delta: Tensor):
        super().__init__()
        self.base_layer = layer.get_base_layer()
        self.register_buffer("delta", delta.to(self.base_layer.weight.device), persistent=False)
        self.train(layer.training)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """(m, n) float32: the base's weight and what is left of the delta."""
        found: Tensor = self.base_layer.weight.float() + self.delta / self.divisor
        return found

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        if isinstance(self.base_layer, nn.Embedding):
            change = functional.embedding(x, self.delta)
        else:
            change = functional.linear(x, self.delta.to(x.dtype))
        return out + (change / self.divisor).to(out.dtype)


def live_deltas(model: nn.Module, surgery: Surgery | None = None) -> dict[str, LowRank]:
    """Weight name in the live model -> the delta of its one active adapter.

    Args:
        model: a PeftModel, adapters not merged.
        surgery: by which it was sliced; random masks are then those of the dense model.

    Raises:
        UnsupportedModelError: an adapter whose delta is no product of two factors.
    """
    places = dense_places(surgery) if surgery is not None else {}
    found = {}
    for path, layer in base_model(model).named_modules():
        if not isinstance(layer, LoraLinear | LoraEmbedding) and not adapts_quantized(layer):
            continue
        for adapter in layer.active_adapters:
            embedding = isinstance(layer, LoraEmbedding)
            if adapter not in (layer.lora_embedding_A if embedding else layer.lora_A):
                continue
            name = f"{path}.weight"
            if adapter in layer.lora_variant or layer.lora_bias.get(adapter) or name in found:
                raise UnsupportedModelError(
                    f"{path}: only a single plain LoRA adapter can be pruned at the export; train without DoRA and "
                    "lora_bias, or set delta.method=identity"
                )
            if embedding:
                a, b = layer.lora_embedding_B[adapter].T, layer.lora_embedding_A[adapter].T
            else:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if getattr(layer, "fan_in_fan_out", False):
                a, b = b.T, a.T
            place = places.get(name) or Place(name, (len(b), a.shape[1]))
            found[name] = LowRank(place, a.detach().cpu(), b.detach().cpu(), layer.scaling[adapter])
    return found


def dense_places(surgery: Surgery) -> dict[str, Place]:
    """Weight name in the sliced model -> where it stands in the dense one, for every linear that a plan may cut."""
    found = {}
    for path, cut in surgery.cuts.items():
        role = next(role for role, name in surgery.arch.family.modules.items() if path.endswith(f".{name}"))
        here = str(surgery.rename(f"{path}.weight"))
        found[here] = Place(f"{path}.weight", surgery.full_shape(role), cut.rows, cut.columns)
    return found


@contextlib.contextmanager
def with_deltas(model: nn.Module, deltas: Mapping[str, Delta]) -> Iterator[dict[str, Changed]]:
    """The live model with these deltas in place of its adapters; everything is as before afterwards.

    Args:
        model: a PeftModel. deltas: weight name -> what stands for its adapter; the others keep theirs.

    Yields:
        Weight name -> the layer that has its delta.
    """
    base, replaced = base_model(model), {}
    changed: dict[str, Changed] = {}
    try:
        for name, delta in deltas.items():
            path = name.removesuffix(".weight")
            layer = base.get_submodule(path)
            with torch.no_grad():
                changed[name] = Changed(layer, delta.whole())
            base.set_submodule(path, changed[name])
            replaced[path] = layer
        yield changed
    finally:
        for path, layer in replaced.items():
            base.set_submodule(path, layer)
