"""Second moments of what reaches the consumers of units, in float32 and without padding.

Legend: T tokens, F input features of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SecondMoments:
    """Sums X^T X of linears' inputs while forward passes run inside ``collecting()``.

    Inputs are taken before any gate multiplies them, so units that are closed are counted too.

    Args:
        model: the plain transformers model.
        modules: paths of the linears.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str]):
        self.modules = {path: model.get_submodule(path) for path in modules}
        self._mask_BS: Tensor | None = None
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0

    def run(self, forward: Callable[[Any], Any], batches: Sequence[dict[str, Tensor]]) -> None:
        """Runs ``forward`` on every batch and adds up; ``attention_mask`` says which tokens count."""
        handles = [
            module.register_forward_pre_hook(self._hook(path), prepend=True) for path, module in self.modules.items()
        ]
        try:
            with torch.no_grad():
                for batch in batches:
                    self._mask_BS = batch.get("attention_mask")
                    self.tokens += int(batch["input_ids"].numel() if self._mask_BS is None else self._mask_BS.sum())
                    forward(batch)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x_TF = args[0].detach().reshape(-1, args[0].shape[-1])
            if self._mask_BS is not None:
                x_TF = x_TF[self._mask_BS.reshape(-1).bool()]
            x_TF = x_TF.float()
            # Autocast would round the products to 16 bit, and the sum would no longer be positive definite.
            with torch.autocast(x_TF.device.type, enabled=False):
                gram_FF = x_TF.T @ x_TF
            self.sums[path] = self.sums[path] + gram_FF if path in self.sums else gram_FF

        return add


def in_groups(modules: Sequence[str], features: Callable[[str], int], limit_bytes: int) -> Iterator[list[str]]:
    """Splits linears into groups whose X^T X together stay under ``limit_bytes`` (at least one a group)."""
    group: list[str] = []
    size = 0
    for path in modules:
        needed = 4 * features(path) ** 2
        if group and size + needed > limit_bytes:
            yield group
            group, size = [], 0
        group.append(path)
        size += needed
    if group:
        yield group
