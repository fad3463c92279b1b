"""Low-rank maps behind linears, folded into them: what a linear gives becomes (I + L R) of it, exactly.

Whatever carries a linear's output features follows: weight, bias, lora_B and its bias; lora_A stays.
Legend: O output features, e rank of the map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fold:
    """The map y -> y + L R y behind a linear; L (O, e) and R (e, O) float32."""

    left: Tensor
    right: Tensor

    @torch.no_grad()
    def apply(self, tensor: Tensor) -> Tensor:
        """(O, ...) a parameter with the linear's output features as rows, folded in float32, in its own dtype."""
        left, right = self.left.to(tensor.device), self.right.to(tensor.device)
        rows = tensor.float()
        return (rows + left @ (right @ rows)).to(tensor.dtype)


def fold_model(base: nn.Module, folds: Mapping[str, Fold]) -> None:
    """Folds maps into a live dense model.

    Args:
        base: the plain transformers model, adapters attached or not. folds: path of a linear -> the map behind it.
    """
    for path, fold in folds.items():
        for name, parameter in base.get_submodule(path).named_parameters():
            if "lora_A" not in name:
                parameter.data = fold.apply(parameter.data)


def fold_tensors(tensors: Mapping[str, Tensor], folds: Mapping[str, Fold]) -> dict[str, Tensor]:
    """Named tensors of adapters on the dense model, folded like the live ones."""
    return {name: _folded(name, tensor, folds) for name, tensor in tensors.items()}


def _folded(name: str, tensor: Tensor, folds: Mapping[str, Fold]) -> Tensor:
    for path, fold in folds.items():
        if f".{path}." in f".{name}" and "lora_A" not in name:
            return fold.apply(tensor)
    return tensor


def flat(folds: Mapping[str, Fold]) -> dict[str, Tensor]:
    """Maps as named tensors, for a file."""
    sides: dict[str, Any] = {}
    for path, fold in folds.items():
        sides |= {f"{path}:left": fold.left.cpu().contiguous(), f"{path}:right": fold.right.cpu().contiguous()}
    return sides


def unflat(tensors: Mapping[str, Tensor]) -> dict[str, Fold]:
    """The maps that ``flat`` named."""
    paths = [name.removesuffix(":left") for name in tensors if name.endswith(":left")]
    return {path: Fold(tensors[f"{path}:left"], tensors[f"{path}:right"]) for path in paths}
