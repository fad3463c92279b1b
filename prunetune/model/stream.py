"""The residual stream made narrower in a live model: embedding, norms, head; its linears are cut by surgery.py.

A masked stream of D dimensions, n of them open, is normalised over all D, zeros included. Over the n alone the same
numbers come out with the gain times sqrt(D / n), and epsilon in the masked norm times n / D, which GateSet sees to: no
number in the config changes, which norms of head size share. A class that multiplies embeddings by the root of the
hidden size gets them times sqrt(D / n); where they are the head's weights too, the norm before the head keeps its gain
instead. Legend: D hidden size, n dimensions that stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.model.architecture import Architecture

# What the norm classes of transformers call epsilon.
EPSILON_NAMES = ("variance_epsilon", "eps")
# Where a parameter in float64 says what it was.
_DTYPE = "_dtype_before"


@torch.no_grad()
def slice_stream(base: Any, arch: Architecture, kept: Sequence[int], *, rounded: bool = True) -> None:
    """Cuts embedding, norms and head of a transformers causal LM to the dimensions that stay, and rescales them.

    Args:
        base: the model; layers that leave are gone already.
        arch: the dense architecture.
        kept: the n dimensions that stay, sorted; nothing happens if they are all.
        rounded: false leaves what is rescaled in float64.
    """
    if len(kept) == arch.hidden_size:
        return
    family, index = arch.family, torch.tensor(kept, dtype=torch.long)
    wider = math.sqrt(arch.hidden_size / len(kept))
    embedding, head = base.get_submodule(family.embedding), base.get_submodule(family.head)
    tied = head.weight is embedding.weight
    scale = 1.0
    if family.scales_embeddings:
        before = float(embedding.embed_scale)
        embedding.scalar_embed_scale = math.sqrt(len(kept))
        embedding.embed_scale.fill_(embedding.scalar_embed_scale)
        # What the class will multiply by is itself rounded to the buffer's dtype.
        scale = before / float(embedding.embed_scale)
    _replace(embedding, embedding.weight.index_select(1, index.to(embedding.weight.device)), scale, rounded)
    embedding.embedding_dim = len(kept)
    if tied:
        head.weight = embedding.weight
    else:
        _replace(head, head.weight.index_select(1, index.to(head.weight.device)), 1.0, rounded)
    head.in_features = len(kept)
    norms = [layer.get_submodule(norm) for layer in base.get_submodule(family.layers) for norm in family.norms]
    for norm in norms:
        _narrow_norm(norm, index, wider, family.gain_offset, rounded)
    last = wider / scale if tied else wider
    _narrow_norm(base.get_submodule(family.final_norm), index, last, family.gain_offset, rounded)
    for module in base.modules():
        if getattr(module, "hidden_size", None) == arch.hidden_size:
            module.hidden_size = len(kept)


def round_stream(base: nn.Module) -> None:
    """Rounds what ``slice_stream`` left in float64 to the dtype that it had."""
    for parameter in base.parameters():
        dtype = vars(parameter).pop(_DTYPE, None)
        if dtype is not None:
            parameter.data = parameter.data.to(dtype)


def _narrow_norm(norm: Any, index: Tensor, factor: float, offset: float, rounded: bool) -> None:
    _replace(norm, norm.weight.index_select(0, index.to(norm.weight.device)), factor, rounded, offset)


def _replace(module: Any, weight: Tensor, factor: float, rounded: bool, offset: float = 0.0) -> None:
    """Gives a module (offset + weight) * factor - offset in place of its weight."""
    old = module.weight
    if factor != 1.0:
        weight = (weight.double() + offset) * factor - offset
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=old.requires_grad)
    setattr(module.weight, _DTYPE, old.dtype)
    if rounded:
        round_stream(module)
