"""Adapters seen from the units: which rows and columns of which linears, and of their LoRA factors, a unit owns.

For methods that rank units by weights or by the adapters' gradients. Nothing is sliced here.
Legend: O output and I input features of a linear, r LoRA rank, U units of a site.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.model.architecture import Architecture
from prunetune.model.families import Columns, Rows, Writers
from prunetune.model.quantized import weight_of
from prunetune.model.sharded import Changing, changing, opened, whole
from prunetune.model.surgery import base_model
from prunetune.model.units import Site, span_features


@dataclass(frozen=True)
class Owner:
    """What the units of one site own of one linear.

    Args:
        site: the site's name.
        units: U.
        axis: 0: each unit owns ``span`` consecutive rows (output features); 1: columns (input features); None: the
            whole linear belongs to ``unit``.
        span: features of one unit. unit: see ``axis``.
    """

    site: str
    units: int
    axis: int | None
    span: int = 1
    unit: int = -1

    def sums(self, matrix_OI: Tensor) -> Tensor:
        """(U,) sums of a matrix of the linear's shape over what each unit owns."""
        if self.axis is None:
            total_U = matrix_OI.new_zeros(self.units)
            total_U[self.unit] = matrix_OI.sum()
            return total_U
        return matrix_OI.sum(1 - self.axis).unflatten(0, (self.units, self.span)).sum(1)

    def features(self, gates_U: Tensor) -> Tensor:
        """One number a unit -> one number for each row or column of the owned axis."""
        return gates_U.repeat_interleave(self.span)


@dataclass(frozen=True)
class AdaptedLinear:
    """A decoder linear with its LoRA factors, and who owns what of it.

    Args:
        path: in the plain model. role: ``q`` ... ``down``. layer: its layer.
        module: the PEFT layer, or the plain linear where there is no adapter.
        owners: one for every site that owns a part of it.
    """

    path: str
    role: str
    layer: int
    module: Any
    owners: tuple[Owner, ...]

    @property
    def adapted(self) -> bool:
        """Whether an adapter learns here."""
        return bool(getattr(self.module, "lora_A", None))

    def factors(self) -> tuple[nn.Parameter, nn.Parameter, float]:
        """(A of (r, I), B of (O, r), scale): the linear acts as W + scale * B A."""
        [name] = self.module.active_adapters
        return self.module.lora_A[name].weight, self.module.lora_B[name].weight, float(self.module.scaling[name])

    @torch.no_grad()
    def weight(self) -> Tensor:
        """(O, I) float32 W + scale * B A; W dequantised if it is stored in 4 or 8 bit."""
        base = getattr(self.module, "base_layer", self.module)
        with opened(base):
            weight_OI = whole(weight_of(base)).float()
            if not self.adapted:
                return weight_OI.clone()  # what was opened for a moment is emptied again
            a_rI, b_Or, scale = self.factors()
            return weight_OI + scale * (whole(b_Or).float() @ whole(a_rI).float())

    @torch.no_grad()
    def weight_gradient(self) -> Tensor:
        """(O, I) float32 estimate of the loss's gradient on the weight, from the adapter's alone: gB A + B gA - gB gA.

        A step of length 1 down gA and gB changes B A by minus this (LoRAPrune, arXiv 2305.18403; the scale is left
        out there). Zeros where no backward pass has come through.
        """
        a_rI, b_Or, _ = self.factors()
        if a_rI.grad is None or b_Or.grad is None:
            return torch.zeros(len(b_Or), a_rI.shape[1], device=a_rI.device)
        a, b, grad_a, grad_b = (whole(t).float() for t in (a_rI, b_Or, a_rI.grad, b_Or.grad))
        return grad_b @ (a - grad_a) + b @ grad_a


class AdapterView:
    """All decoder linears of a model with the units that own them.

    Args:
        model: a PeftModel, dense.
        arch: its architecture.
        sites: the sites that are gated.
        changing: how factors are opened to be changed, which depends on the engine.
    """

    def __init__(
        self,
        model: nn.Module,
        arch: Architecture,
        sites: Iterable[Site],
        changing: Changing = changing,
    ):
        self.changing = changing
        # Beside the factors there may be modules that are trained whole, and biases.
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        base, family = base_model(model), arch.family
        owners: dict[tuple[int, str], list[Owner]] = {}
        for site in sites:
            for layer in range(arch.layers) if site.layer < 0 else [site.layer]:
                for part in family.parts(site.kind):
                    for role in family.modules if isinstance(part, Writers) else [part.role]:
                        owners.setdefault((layer, role), []).append(_owner(arch, site, layer, part))
        self.linears = tuple(
            AdaptedLinear(path, role, layer, base.get_submodule(path), tuple(found))
            for (layer, role), found in sorted(owners.items())
            for path in [f"{family.layers}.{layer}.{family.modules[role]}"]
        )


def _owner(arch: Architecture, site: Site, layer: int, part: Rows | Columns | Writers) -> Owner:
    if isinstance(part, Writers):
        return Owner(site.name, site.size, None, unit=layer)
    return Owner(site.name, site.size, 0 if isinstance(part, Rows) else 1, span_features(arch, part.span))
