"""Inputs of a layer's consumers, recorded straight from the model: what formulas are computed from by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.contracts.scores import World

LAYER = 1


@torch.no_grad()
def recorded(of: World, layer: int = LAYER) -> dict[str, Tensor]:
    """``o`` and ``down``: (T, F) inputs over all rows; ``before`` and ``after``: (T, D) the layer's own."""
    found: dict[str, list[Tensor]] = {"o": [], "down": [], "before": [], "after": []}
    block = of.model.model.layers[layer]

    def keep(role: str) -> Any:
        return lambda module, args: found[role].append(args[0][0])

    def around(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        found["before"].append((args[0] if args else kwargs["hidden_states"])[0])
        found["after"].append(output[0])

    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(keep("o")),
        block.mlp.down_proj.register_forward_pre_hook(keep("down")),
        block.register_forward_hook(around, with_kwargs=True),
    ]
    for row in of.rows:
        of.model(torch.tensor([row.input_ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def group_parts(of: World, group: int, layer: int = LAYER) -> list[tuple[str, slice, int]]:
    """(role, slice, axis) of everything that a KV group owns, written out from the widths."""
    size, queries = of.arch.head_dim, of.arch.queries_per_group
    own = slice(group * size, (group + 1) * size)
    shared = slice(group * queries * size, (group + 1) * queries * size)
    return [("q", shared, 0), ("k", own, 0), ("v", own, 0), ("o", shared, 1)]


def part(matrix: Tensor, span: slice, axis: int) -> Tensor:
    return matrix[span] if axis == 0 else matrix[:, span]
