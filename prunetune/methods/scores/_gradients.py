"""What the criteria that need gradients share: the matrices that units own, and the loss of one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunetune.model.architecture import Architecture
from prunetune.model.token_rows import IGNORED_LABEL, TokenRow


def prunable_weights(model: Any, arch: Architecture) -> dict[tuple[int, str], Tensor]:
    """(layer, role) -> the (out, in) weight of every linear that units have rows or columns of."""
    family = arch.family
    return {
        (layer, role): model.get_submodule(f"{family.layers}.{layer}.{module}").weight
        for layer in range(arch.layers)
        for role, module in family.modules.items()
    }


def target_losses(model: Any, row: TokenRow) -> Tensor:
    """(T,) float32 cross-entropy of the row's target tokens."""
    device = next(model.parameters()).device
    ids, labels = torch.tensor([row.input_ids], device=device), torch.tensor(row.labels[1:], device=device)
    logits_TV = model(input_ids=ids, use_cache=False).logits[0, :-1]
    targets = labels != IGNORED_LABEL
    return torch.nn.functional.cross_entropy(logits_TV[targets].float(), labels[targets], reduction="none")


def row_loss(model: Any, row: TokenRow) -> Tensor:
    """Mean cross-entropy of the row's target tokens."""
    return target_losses(model, row).mean()
