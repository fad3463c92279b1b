"""The proximal step of a group lasso on LoRA factors: whole units shrink toward zero, and reach it.

Legend: O output and I input features of a linear, r LoRA rank, U units of a site, s features of a unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from prunetune.model.adapters import AdaptedLinear, Owner


@torch.no_grad()
def shrink(linears: Iterable[AdaptedLinear], amounts: Mapping[str, Tensor]) -> None:
    """x <- x * max(0, |x| - amount) / |x| for the LoRA slices x of every unit, all its linears' in one norm.

    Rows of B belong to units that own outputs, columns of A to units that own inputs, both to whole layers.

    Args:
        linears: changed in place. amounts: site -> (U,) what is taken off each unit's norm; 0 leaves it alone.
    """
    slices = [
        (owner, part)
        for linear in linears
        if linear.adapted
        for owner in linear.owners
        if owner.site in amounts and bool(amounts[owner.site].any())
        for part in _slices(linear, owner)
    ]
    squares: dict[str, Tensor] = {}
    for owner, part_Usr in slices:
        own_U = part_Usr.float().square().sum((1, 2)).cpu()
        squares[owner.site] = squares.get(owner.site, torch.zeros(owner.units)).index_add(0, _units(owner), own_U)
    for owner, part_Usr in slices:
        norm_U = squares[owner.site].sqrt()
        left_U = (norm_U - amounts[owner.site]).clamp(min=0) / norm_U.clamp(min=1e-30)
        part_Usr *= left_U[_units(owner)].to(part_Usr)[:, None, None]


def _units(owner: Owner) -> Tensor:
    """The units that ``_slices`` has rows for."""
    return torch.arange(owner.units) if owner.axis is not None else torch.tensor([owner.unit])


def _slices(linear: AdaptedLinear, owner: Owner) -> Iterator[Tensor]:
    """Views (U, s, r), or (U, s, r) for one unit: what the owner's units have of the factors."""
    a_rI, b_Or, _ = linear.factors()
    if owner.axis in (0, None):
        yield b_Or.data.unflatten(0, (-1, owner.span)) if owner.axis == 0 else b_Or.data[None]
    if owner.axis in (1, None):
        yield a_rI.data.T.unflatten(0, (-1, owner.span)) if owner.axis == 1 else a_rI.data.T[None]
