"""The freeze: from a checkpoint of the masked dense model to one of the sliced model, and back from its folder.

``freeze/`` holds ``plan.json``, ``scores.safetensors``, ``updates.safetensors`` (base weights changed by
compensation, already sliced), ``folds.safetensors`` (maps that a mask learnt behind linears, if any), ``ranks.json``
(the adapters' ranks from here on, if they change), ``adapter/`` (before slicing, for another budget later) and
``checkpoint/`` (sliced, to resume from). It appears in one step, so a run is either before its freeze or after it.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunetune.core.errors import PlanMismatchError
from prunetune.core.files import new_folder
from prunetune.methods.compensation import Compensation
from prunetune.model.fold import Fold, flat, fold_model, unflat
from prunetune.model.plan import Plan
from prunetune.model.quantized import FloatLinear, dtype_of, shape_of, weight_of
from prunetune.model.ranks import Ranks
from prunetune.model.sharded import opened
from prunetune.model.source import requantize
from prunetune.model.statistics import SecondMoments, in_groups
from prunetune.model.surgery import Surgery, base_model, slice_model
from prunetune.train.checkpoint import (
    load_mask,
    read_marker,
    save_mask,
    slice_checkpoint,
    write_marker,
)

FREEZE = "freeze"
PLAN_FILE = "plan.json"
SCORES_FILE = "scores.safetensors"
UPDATES_FILE = "updates.safetensors"
FOLDS_FILE = "folds.safetensors"
RANKS_FILE = "ranks.json"

# Second moments of as many linears as fit are collected in one pass over the calibration tokens.
MOMENTS_LIMIT_BYTES = 2 * 2**30


def compensated_weights(
    model: nn.Module,
    surgery: Surgery,
    compensation: Compensation,
    collect: Callable[[SecondMoments], None],
) -> dict[str, Tensor]:
    """New base weights of the linears that lose inputs.

    Args:
        model: the dense model with adapters attached, its gates open.
        surgery: the plan made ready for it.
        compensation: the method.
        collect: runs the calibration tokens through the model while the moments listen, on all processes.

    Returns:
        dense module path -> (out, kept) base weight in the base's dtype, on the CPU; with the adapters added back
        it is the weight that the method found. Linears that the method leaves alone are not in it.
    """
    base = base_model(model)
    updates: dict[str, Tensor] = {}
    for group in in_groups(surgery.consumers, lambda path: base.get_submodule(path).in_features, MOMENTS_LIMIT_BYTES):
        moments = SecondMoments(base, group)
        if compensation.tokens:
            collect(moments)
        for path in group:
            module, kept, rows = base.get_submodule(path), surgery.cuts[path].columns, surgery.cuts[path].rows
            assert kept is not None
            with opened(module):
                weight, delta = _weight_and_delta(module)
                dtype = dtype_of(getattr(module, "base_layer", module))
                kept = kept.to(weight.device)
                effective = weight.float() + delta
                found = compensation.weight(effective, kept, moments.sums.pop(path, None))
                # Adding the delta and taking it off again would round a weight that the method left alone.
                if not torch.equal(found, effective.index_select(1, kept)):
                    update = (found - delta.index_select(1, kept)).to(dtype).cpu()
                    updates[path] = (update if rows is None else update.index_select(0, rows)).contiguous()
    return updates


def _weight_and_delta(module: Any) -> tuple[Tensor, Tensor]:
    """(base weight, float32 delta of the active adapters) of a linear or a PEFT layer around one."""
    if not hasattr(module, "base_layer"):
        weight = weight_of(module)
        return weight, torch.zeros_like(weight, dtype=torch.float32)
    weight = weight_of(module.base_layer)
    delta = torch.zeros_like(weight, dtype=torch.float32)
    for adapter in module.active_adapters:
        delta += module.get_delta_weight(adapter).detach().float()
    return weight, delta


def write_freeze(
    target: Path,
    checkpoint: Path,
    plan: Plan,
    surgery: Surgery,
    scores: dict[str, Tensor],
    updates: dict[str, Tensor],
    folds: Mapping[str, Fold],
    ranks: Ranks | None,
) -> None:
    """Writes the freeze folder in one step; see the module's docstring for what is in it."""
    with new_folder(target, replace=True) as folder:
        plan.save(folder / PLAN_FILE)
        save_file({name: score.contiguous() for name, score in scores.items()}, folder / SCORES_FILE)
        save_file(updates, folder / UPDATES_FILE)
        if folds:
            save_file(flat(folds), folder / FOLDS_FILE)
        if ranks is not None:
            ranks.save(folder / RANKS_FILE)
        (folder / "adapter").mkdir()
        for file in checkpoint.glob("adapter_*"):
            shutil.copy2(file, folder / "adapter")
        sliced = folder / "checkpoint"
        slice_checkpoint(checkpoint, sliced, surgery, folds, ranks)
        save_mask(sliced, load_mask(checkpoint))
        facts = read_marker(checkpoint) or {}
        write_marker(sliced, {**facts, "frozen": True, "plan": plan.digest()})
        write_marker(folder, {"plan": plan.digest()})


def adopt_freeze(model: nn.Module, folder: Path) -> Plan:
    """Slices a live dense model as a freeze folder says, compensation included.

    Args:
        model: the dense model with fresh or trained adapters.
        folder: the freeze folder.

    Raises:
        PlanMismatchError: the folder belongs to another model.
    """
    plan, updates = Plan.load(folder / PLAN_FILE), load_updates(folder)
    fold_model(base_model(model), load_folds(folder))
    surgery = Surgery(slice_model(model, plan), plan)
    apply_updates(model, surgery, updates)
    requantize(model, surgery, updates)
    if (ranks := load_ranks(folder)) is not None:
        ranks.change(model)
    return plan


def load_updates(folder: Path) -> dict[str, Tensor]:
    """The compensated base weights of a freeze folder, by module path in the dense model."""
    return load_file(folder / UPDATES_FILE)


def load_folds(folder: Path) -> dict[str, Fold]:
    """The maps that were folded into the dense model of a freeze folder, by module path; none for most masks."""
    path = folder / FOLDS_FILE
    return unflat(load_file(path)) if path.is_file() else {}


def load_ranks(folder: Path) -> Ranks | None:
    """The adapters' ranks from a freeze on; None if they are what they were before."""
    path = folder / RANKS_FILE
    return Ranks.load(path) if path.is_file() else None


def apply_updates(model: nn.Module, surgery: Surgery, updates: Mapping[str, Tensor]) -> None:
    """Puts compensated base weights into a sliced model; a quantised one holds them as numbers until ``requantize``."""
    base = base_model(model)
    for path, update in updates.items():
        module = base.get_submodule(surgery.sliced_path(path))
        layer = module.base_layer if hasattr(module, "base_layer") else module
        with opened(layer):
            if shape_of(layer) != update.shape:
                raise PlanMismatchError(
                    f"the weights kept from the freeze do not fit {path}: {tuple(update.shape)} against "
                    f"{tuple(shape_of(layer))}"
                )
            if isinstance(layer, FloatLinear):
                layer.build = functools.partial(torch.detach, update)
            else:
                layer.weight.data.copy_(update)
