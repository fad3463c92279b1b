"""What deltas do to real inputs: mean squares of a linear's inputs, and the mean energy of what its delta adds.

Legend: T tokens, n inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.model.deltas import Delta, LowRank


@dataclass(frozen=True)
class Inputs:
    """What one linear saw, averaged over tokens.

    Args:
        squares: (n,) mean of x_j^2. means: (n,) mean of x_j. energy: mean of |Dx|^2.
    """

    squares: Tensor
    means: Tensor
    energy: float


@torch.no_grad()
def measure_inputs(
    model: nn.Module, deltas: Mapping[str, Delta], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Inputs]:
    """Runs the model and watches the linears that have a delta.

    Args:
        model: the base model, or a PeftModel's, whole.
        deltas: name of a linear's weight -> its delta, in the model's own shape.
        batches: model inputs; padding is told by ``attention_mask``.

    Returns:
        By weight name, float32, over all tokens that are not padding. A delta that is no linear's (an embedding's) is
        left out.
    """
    squares: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    energy: dict[str, float] = {}
    state: dict[str, Any] = {"mask": None, "tokens": 0}

    def watch(name: str, delta: Delta) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x_Tn = args[0].flatten(0, -2)[state["mask"]].float()
            squares[name] = squares.get(name, torch.zeros(x_Tn.shape[1])) + x_Tn.square().sum(0).cpu()
            sums[name] = sums.get(name, torch.zeros(x_Tn.shape[1])) + x_Tn.sum(0).cpu()
            energy[name] = energy.get(name, 0.0) + _energy(delta, x_Tn)

        return hook

    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in deltas}
    # Of a PEFT layer the linear inside: it sees the same inputs.
    inner = {name: getattr(module, "base_layer", module) for name, module in modules.items()}
    linears = {name: module for name, module in inner.items() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_pre_hook(watch(name, deltas[name])) for name, module in linears.items()]
    try:
        for batch in batches:
            mask = batch["attention_mask"].flatten().bool()
            state["mask"] = mask
            state["tokens"] += int(mask.sum())
            model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    count = state["tokens"]
    return {name: Inputs(squares[name] / count, sums[name] / count, energy[name] / count) for name in squares}


def _energy(delta: Delta, x_Tn: Tensor) -> float:
    """Sum over tokens of |Dx|^2."""
    if isinstance(delta, LowRank):
        out = (x_Tn @ delta.a.to(x_Tn.device).T) @ delta.b.to(x_Tn.device).T * delta.scale
        return float(out.double().square().sum())
    blocks = (x_Tn @ block.to(x_Tn.device).T for _, block in delta.blocks())
    return sum(float(out.double().square().sum()) for out in blocks)
