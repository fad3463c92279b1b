"""The proximal step of a group lasso on LoRA factors: whole units shrink toward zero, and reach it.

Legend: O output and I input features of a linear, r LoRA rank, U units of a site, s features of a unit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from prunetune.model.adapters import AdapterView, Owner


@torch.no_grad()
def shrink(adapters: AdapterView, amounts: Mapping[str, Tensor]) -> None:
    """x <- x * max(0, |x| - amount) / |x| for the LoRA slices x of every unit, all its linears' in one norm.

    Rows of B belong to units that own outputs, columns of A to units that own inputs, both to whole layers.

    Args:
        adapters: changed in place. amounts: site -> (U,) what is taken off each unit's norm; 0 leaves it alone.
    """
    with contextlib.ExitStack() as stack:
        slices = [
            (owner, part)
            for linear in adapters.linears
            if linear.adapted and any(_shrinks(owner, amounts) for owner in linear.owners)
            for a_rI, b_Or in [stack.enter_context(adapters.changing(linear.factors()[:2]))]
            for owner in linear.owners
            if _shrinks(owner, amounts)
            for part in _slices(a_rI, b_Or, owner)
        ]
        squares: dict[str, Tensor] = {}
        for owner, part_Usr in slices:
            own_U = part_Usr.float().square().sum((1, 2)).cpu()
            squares[owner.site] = squares.get(owner.site, torch.zeros(owner.units)).index_add(0, _units(owner), own_U)
        for owner, part_Usr in slices:
            norm_U = squares[owner.site].sqrt()
            left_U = (norm_U - amounts[owner.site]).clamp(min=0) / norm_U.clamp(min=1e-30)
            part_Usr *= left_U[_units(owner)].to(part_Usr)[:, None, None]


def _shrinks(owner: Owner, amounts: Mapping[str, Tensor]) -> bool:
    return owner.site in amounts and bool(amounts[owner.site].any())


def _units(owner: Owner) -> Tensor:
    """The units that ``_slices`` has rows for."""
    return torch.arange(owner.units) if owner.axis is not None else torch.tensor([owner.unit])


def _slices(a_rI: Tensor, b_Or: Tensor, owner: Owner) -> Iterator[Tensor]:
    """Views (U, s, r), or (U, s, r) for one unit: what the owner's units have of the factors."""
    if owner.axis in (0, None):
        yield b_Or.unflatten(0, (-1, owner.span)) if owner.axis == 0 else b_Or[None]
    if owner.axis in (1, None):
        yield a_rI.T.unflatten(0, (-1, owner.span)) if owner.axis == 1 else a_rI.T[None]
