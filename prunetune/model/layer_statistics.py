"""What calibration tokens say about one decoder layer: moments of what reaches its consumers, and what it changes.

Sums are merged over batches in float64 and kept in float32; padding never comes here. Which passes are made and where
the results are kept is decided in sequential.py.
Legend: T tokens, F inputs of a linear, H query heads, K KV groups, B batch, S sequence, D hidden.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.model.architecture import Architecture

# The linears whose inputs are units: the attention's and the MLP's way back to the residual stream.
CONSUMERS = ("o", "down")


class RunningMoments:
    """Mean, variance and mean absolute value of F inputs over batches of tokens.

    Batches are merged by the pairwise formula of Chan, Golub and LeVeque (1983), which is exact for any sizes.

    Args:
        features: F.
        products: also sum x x^T, (F, F).
    """

    def __init__(self, features: int, *, products: bool = False):
        self.tokens = 0
        self._mean_F = torch.zeros(features, dtype=torch.float64)
        self._squares_F = torch.zeros(features, dtype=torch.float64)
        self._absolute_F = torch.zeros(features, dtype=torch.float64)
        self._products_FF: Tensor | None = None
        self._wants_products = products

    def add(self, x_TF: Tensor) -> None:
        """Takes a batch of tokens."""
        x_TF = x_TF.float()
        count = x_TF.shape[0]
        variance_F, mean_F = torch.var_mean(x_TF, dim=0, correction=0)
        squares_F, mean_F = variance_F.double().cpu() * count, mean_F.double().cpu()
        total = self.tokens + count
        shift_F = mean_F - self._mean_F
        self._mean_F += shift_F * (count / total)
        self._squares_F += squares_F + shift_F.square() * (self.tokens * count / total)
        self._absolute_F += x_TF.abs().sum(0).double().cpu()
        self.tokens = total
        if self._wants_products:
            if self._products_FF is None:
                self._products_FF = torch.zeros(x_TF.shape[1], x_TF.shape[1], device=x_TF.device)
            self._products_FF.addmm_(x_TF.T, x_TF)

    def result(self) -> dict[str, Tensor]:
        """``mean``, ``variance`` (divided by the number of tokens), ``absolute``, and ``products`` if they were asked
        for; float32 on the CPU."""
        found = {
            "mean": self._mean_F.float(),
            "variance": (self._squares_F / self.tokens).float(),
            "absolute": (self._absolute_F / self.tokens).float(),
        }
        return found if self._products_FF is None else {**found, "products": self._products_FF.cpu()}


@dataclass(frozen=True)
class InputStatistics:
    """Of the inputs of one consumer, over all calibration tokens; float32.

    Args:
        mean, variance, absolute: (F,) E x, E (x - E x)^2, E |x|.
        products: (F, F) sum of x x^T, if it was collected.
    """

    mean: Tensor
    variance: Tensor
    absolute: Tensor
    products: Tensor | None = None

    @property
    def square(self) -> Tensor:
        """(F,) E x^2."""
        return self.variance + self.mean.square()


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer, over all calibration tokens.

    Args:
        inputs: role of a consumer -> its inputs' statistics.
        heads, groups: (H,), (K,) mean L1 norm of what a query head, a KV group, adds to the attention's output.
        cosine: mean cosine between the layer's input and output. angle: mean angle between them over pi, in [0, 1].
        tokens: how many there were.
    """

    inputs: Mapping[str, InputStatistics]
    heads: Tensor
    groups: Tensor
    cosine: float
    angle: float
    tokens: int

    def tensors(self) -> dict[str, Tensor]:
        """Everything as flat tensors, for a file."""
        found = {"heads": self.heads, "groups": self.groups}
        found["layer"] = torch.tensor([self.cosine, self.angle, self.tokens], dtype=torch.float64)
        for role, part in self.inputs.items():
            values = {"mean": part.mean, "variance": part.variance, "absolute": part.absolute}
            values |= {} if part.products is None else {"products": part.products}
            found |= {f"{role}.{name}": value for name, value in values.items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerStatistics:
        """The inverse of ``tensors``; products may be left out of the file's tensors."""
        cosine, angle, tokens = tensors["layer"].tolist()
        inputs = {
            role: InputStatistics(
                tensors[f"{role}.mean"],
                tensors[f"{role}.variance"],
                tensors[f"{role}.absolute"],
                tensors.get(f"{role}.products"),
            )
            for role in CONSUMERS
        }
        return cls(inputs, tensors["heads"], tensors["groups"], cosine, angle, int(tokens))


class LayerCollector:
    """Collects the statistics of one layer while it runs.

    Args:
        arch: the dense model. layer: the module, in memory.
        products: consumers of whose inputs x x^T is collected too.
    """

    def __init__(self, arch: Architecture, layer: nn.Module, *, products: Collection[str] = ()):
        self._arch = arch
        self._modules: dict[str, Any] = {role: layer.get_submodule(arch.family.modules[role]) for role in CONSUMERS}
        self._moments = {
            role: RunningMoments(module.in_features, products=role in products)
            for role, module in self._modules.items()
        }
        self._heads = torch.zeros(arch.query_heads, dtype=torch.float64)
        self._groups = torch.zeros(arch.kv_groups, dtype=torch.float64)
        self._cosine = self._angle = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, every forward pass through the consumers is counted."""
        handles = [
            module.register_forward_pre_hook(self._hook(role), prepend=True) for role, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, role: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x_TF = args[0].detach().flatten(0, -2).float()
            self._moments[role].add(x_TF)
            if role == "o":
                self._add_heads(x_TF, module.weight.detach().float())  # type: ignore[operator]

        return add

    def _add_heads(self, x_TF: Tensor, weight_DF: Tensor) -> None:
        """Head by head, because tokens x heads x hidden would be larger than the layer."""
        size, queries = self._arch.head_dim, self._arch.queries_per_group
        for group in range(self._arch.kv_groups):
            together = torch.zeros(x_TF.shape[0], weight_DF.shape[0], device=x_TF.device)
            for head in range(group * queries, (group + 1) * queries):
                span = slice(head * size, (head + 1) * size)
                out_TD = x_TF[:, span] @ weight_DF[:, span].T
                self._heads[head] += float(out_TD.abs().sum())
                together += out_TD
            self._groups[group] += float(together.abs().sum())

    def add_change(self, before_BSD: Tensor, after_BSD: Tensor) -> None:
        """Takes a batch of the layer's input and output."""
        cosine_T = torch.cosine_similarity(before_BSD.flatten(0, 1).float(), after_BSD.flatten(0, 1).float(), dim=-1)
        self._cosine += float(cosine_T.double().sum())
        self._angle += float(cosine_T.double().clamp(-1, 1).arccos().sum()) / math.pi

    def result(self) -> LayerStatistics:
        """The statistics of everything that was taken."""
        tokens = self._moments["o"].tokens
        return LayerStatistics(
            {role: InputStatistics(**moments.result()) for role, moments in self._moments.items()},
            (self._heads / tokens).float(),
            (self._groups / tokens).float(),
            self._cosine / tokens,
            self._angle / tokens,
            tokens,
        )
