"""Gates: numbers in [0, 1] that multiply what a unit hands to its consumer, without wrapping any module.

A forward pre-hook multiplies the consumer's input (a forward hook the writers' outputs, for whole layers and for the
hidden width), so adapters and quantised bases work unchanged and a closed gate equals a removed unit. The gates are
leaf tensors outside the model: no engine shards them, no optimizer decays them, no clipping mixes them with the
adapters.
Legend: B batch, S sequence, F features of the gated tensor, U units, T = B * S tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.core.errors import UnsupportedModelError
from prunetune.model.stream import EPSILON_NAMES
from prunetune.model.units import HIDDEN, Site


@dataclass(frozen=True)
class GateStatistics:
    """What one optimizer step's backward passes say about the gates; summed over its micro-batches.

    Args:
        grad: site -> (U,) float32, d loss / d gate.
        square: site -> (U,) float32, sum over positions of the square of what each adds to the gate gradient; empty
            unless the GateSet was asked to record it. A position adds to the losses of all tokens after it too.
    """

    grad: dict[str, Tensor]
    square: dict[str, Tensor]


class _Gate(torch.autograd.Function):
    """y = x * gate, with the gate's gradient reduced in float32 and, if asked, its positions' squares.

    ``product`` is the autograd node that made x as a product of two tensors which the graph keeps anyway: then x
    is multiplied again in backward, bit for bit, instead of being kept beside y.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BSF: Tensor, gate_U: Tensor, block: int, square_U: Tensor | None, product: Any = None
    ) -> Tensor:
        gate_F = gate_U.to(x_BSF.dtype)
        if block > 1:
            gate_F = gate_F.repeat_interleave(block)
        ctx.save_for_backward(gate_F, *([x_BSF] if product is None else []))
        ctx.block, ctx.units, ctx.square_U, ctx.product = block, gate_U.shape[0], square_U, product
        return x_BSF * gate_F

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        [grad_BSF] = grads
        gate_F, *factors = ctx.saved_tensors
        if ctx.product is not None:
            factors = [ctx.product._saved_self, ctx.product._saved_other]
        rows = [factor.flatten(0, -2) for factor in factors]
        grad_U = _reduce(grad_BSF.flatten(0, -2), rows, ctx.units, ctx.block, ctx.square_U)
        return grad_BSF * gate_F, grad_U, None, None, None


def _product_node(x: Tensor) -> Any:
    """The node that made x by multiplying two kept tensors of its own shape; None if it was made otherwise."""
    node = x.grad_fn
    if node is None or node.name() != "MulBackward0":
        return None
    factors = getattr(node, "_saved_self", None), getattr(node, "_saved_other", None)
    return node if all(factor is not None and factor.shape == x.shape for factor in factors) else None


def _reduce(grad_TF: Tensor, factors: list[Tensor], units: int, block: int, square_U: Tensor | None) -> Tensor:
    """(U,) float32: sum over tokens and a unit's features of grad * x; adds the squares of its tokens' sums.

    x is the product of ``factors``, each (T, F). A CPU works through blocks of tokens that stay in its cache; a GPU
    takes all at once.
    """
    rows = grad_TF.shape[0] if grad_TF.is_cuda else max(1, 2**19 // grad_TF.shape[1])
    sum_U = torch.zeros(units, device=grad_TF.device)
    blocks = zip(grad_TF.split(rows), *(factor.split(rows) for factor in factors), strict=True)
    for grad_tF, *factors_tF in blocks:
        product = grad_tF.float() * math.prod(factors_tF[1:], start=factors_tF[0]).float()
        if units == 1:
            product = product.sum(-1, keepdim=True)
        elif block > 1:
            product = product.unflatten(-1, (units, block)).sum(-1)
        sum_U += product.sum(0)
        if square_U is not None:
            square_U += product.square_().sum(0)
    return sum_U


class GateSet:
    """The gates of a model's sites.

    Args:
        model: the plain transformers model (for a PeftModel, its ``get_base_model()``).
        sites: the sites to gate.
        record_squares: also sum the squares of what each position adds to the gradient (a little slower).
        recompute: multiply an MLP's two halves again in backward rather than keep their product too. Only where
            nothing else hooks saved tensors: activation checkpointing and offloading hand each out only once.

    Raises:
        UnsupportedModelError: a module named by the family's table is missing.
    """

    def __init__(
        self, model: nn.Module, sites: Iterable[Site], *, record_squares: bool = False, recompute: bool = False
    ):
        self.sites = tuple(sites)
        self.record_squares = record_squares
        self._recompute = recompute
        self._model = model
        self._values: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._open: dict[str, float] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._bypassed = False
        # Norm -> its attribute and value of epsilon, as they are without gates.
        self._epsilons: dict[nn.Module, tuple[str, float]] = {}

    def attach(self) -> None:
        """Installs the hooks, with all gates open."""
        if self._handles:
            return
        self.set({site.name: torch.ones(site.size) for site in self.sites})
        for site in self.sites:
            for index, path in enumerate(site.gated):
                module = _submodule(self._model, path, site)
                if site.kind in ("layers", HIDDEN):
                    unit = index * site.size // len(site.gated) if site.kind == "layers" else None
                    self._handles.append(module.register_forward_hook(self._output_hook(site, unit)))
                else:
                    self._handles.append(module.register_forward_pre_hook(self._input_hook(site)))
            for path in site.norms:
                norm = _submodule(self._model, path, site)
                name = next(name for name in EPSILON_NAMES if hasattr(norm, name))
                self._epsilons[norm] = name, float(getattr(norm, name))
                self._handles.append(norm.register_forward_pre_hook(self._norm_hook(site)))

    def detach(self) -> None:
        """Removes the hooks; the model is as if there had never been gates."""
        for handle in self._handles:
            handle.remove()
        for norm, (name, epsilon) in self._epsilons.items():
            setattr(norm, name, epsilon)
        self._epsilons.clear()
        self._handles.clear()
        self._values.clear()
        self._squares.clear()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Lets everything through, whatever the gates are, and takes nothing down while it lasts."""
        self._bypassed = True
        try:
            yield
        finally:
            self._bypassed = False

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Sets the gates for the forward passes to come and forgets what was collected.

        Call it once per optimizer step, outside any forward: recomputation under activation checkpointing must
        see the same values.

        Args:
            values: site -> (U,) gates in [0, 1]; sites that are absent keep their values.
        """
        for site in self.sites:
            value = values.get(site.name, self._values.get(site.name))
            if value is None or value.shape != (site.size,):
                raise ValueError(f"gates of {site.name} must have shape ({site.size},)")
            device = self._device(site)
            self._values[site.name] = value.detach().to(device, torch.float32).clone().requires_grad_()
            if site.norms:
                self._open[site.name] = float(value.detach().double().mean())
            if self.record_squares:
                self._squares[site.name] = torch.zeros(site.size, device=device)

    def values(self) -> dict[str, Tensor]:
        """site -> (U,) float32 gates in force."""
        return {name: value.detach() for name, value in self._values.items()}

    def collect(self) -> GateStatistics:
        """What the backward passes since the last ``set`` said; zeros where none came through."""
        grads = {
            name: torch.zeros_like(value) if value.grad is None else value.grad.detach().clone()
            for name, value in self._values.items()
        }
        return GateStatistics(grads, dict(self._squares))

    def _device(self, site: Site) -> torch.device:
        parameter = next(_submodule(self._model, site.gated[0], site).parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _square(self, site: Site) -> Tensor | None:
        # Only a pass that will be differentiated may add to the record; evaluation passes do not reach backward.
        return self._squares.get(site.name)

    def _input_hook(self, site: Site) -> Any:
        def gate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if self._bypassed:
                return args
            product = _product_node(args[0]) if self._recompute else None
            gated = _Gate.apply(args[0], self._values[site.name], site.block, self._square(site), product)
            return (gated, *args[1:])

        return gate_input

    def _output_hook(self, site: Site, unit: int | None) -> Any:
        own = slice(None) if unit is None else slice(unit, unit + 1)

        def gate_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if self._bypassed:
                return output
            square = self._square(site)
            return _Gate.apply(output, self._values[site.name][own], 1, None if square is None else square[own])

        return gate_output

    def _norm_hook(self, site: Site) -> Any:
        """A norm over D dimensions of which n are open divides by the root of sum / D + epsilon; the norm over these n
        by that of sum / n + epsilon. With epsilon * n / D in the former they differ by a factor alone (stream.py)."""

        def scale_epsilon(module: nn.Module, args: tuple[Any, ...]) -> None:
            name, epsilon = self._epsilons[module]
            open_ = 1.0 if self._bypassed else self._open[site.name]
            setattr(module, name, epsilon * open_)

        return scale_epsilon


def _submodule(model: nn.Module, path: str, site: Site) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"the model has no module {path!r}, which the unit table names for {site.kind}; its class differs from the "
            "stock one that the table was written for. Load the stock class (no remote code), or add a family."
        ) from error
