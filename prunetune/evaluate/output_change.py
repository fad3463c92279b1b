"""How far a model's outputs are from what they were: what a search goes by that has no labels.

Legend: S sequence, V vocabulary, K the largest logits that are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunetune.model.token_rows import TokenRow
from prunetune.model.token_stats import evaluating

_LARGEST = 5


class OutputChange:
    """Mean squared change of the five logits that were largest at every position (arXiv 2410.09344).

    Args:
        model: as it is to stay. rows: inputs; labels are not looked at.
    """

    def __init__(self, model: Any, rows: Sequence[TokenRow]):
        self._rows = rows
        self._largest = [logits_SV.topk(_LARGEST, dim=-1) for logits_SV in self._logits(model)]

    def __call__(self, model: Any) -> float:
        """The change of the model as it is now, in squared logits."""
        total = count = 0.0
        for logits_SV, (values_SK, ids_SK) in zip(self._logits(model), self._largest):
            change_SK = logits_SV.gather(-1, ids_SK) - values_SK
            total += float(change_SK.double().square().sum())
            count += change_SK.numel()
        return total / count

    def _logits(self, model: Any) -> Any:
        def one(row: TokenRow) -> Tensor:
            ids = torch.tensor([row.input_ids], device=model.device)
            logits: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
            return logits

        with torch.no_grad(), evaluating(model):
            for row in self._rows:
                yield one(row)
