"""Merges that stay adapters: factors pruned without leaving their rank, several adapters joined to one, exactly.

Legend: R rank of the joined adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunetune.core.errors import ExportError, UnsupportedModelError
from prunetune.core.files import new_folder, write_json
from prunetune.export.stream_merge import MERGE_FILE, Part, StreamMerge
from prunetune.methods.deltas import DeltaContext
from prunetune.methods.deltas.rank import Rank
from prunetune.model.deltas import LowRank
from prunetune.model.tuned import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter

_CAN = "dare and darex_q (which mask A alone), structural, rank and identity"


def write_adapter(merge: StreamMerge, folder: Path, metadata: Mapping[str, Any], *, replace: bool = False) -> None:
    """Writes a PEFT adapter folder whose delta is the weighted sum of the pruned deltas.

    Several adapters are concatenated: ranks add up and nothing is lost. ``rank`` truncates what is joined, not what
    goes into it. Every module's own rank and scale (1) stand in the adapter's patterns.

    Args:
        merge: of adapters; no votes on signs. folder: takes its content in one step.
        metadata: JSON values that say what was merged how. replace: overwrite a former merge there.

    Raises:
        UnsupportedModelError: a source is no LoRA adapter, or what it trained beside the factors cannot be added up.
        ExportError: ``folder`` exists; the method leaves no product of factors.
    """
    if folder.exists() and not (replace and (folder / MERGE_FILE).is_file()):
        raise ExportError(f"{folder} exists; name another folder, or replace a former merge there with --overwrite")
    adapters = [source.tuned for source in merge.sources if isinstance(source.tuned, Adapter)]
    if len(adapters) < len(merge.sources):
        raise UnsupportedModelError("only adapters can become one adapter; write a model, or take --delta rank on it")
    if merge.replaced and len(adapters) > 1:
        raise UnsupportedModelError(
            f"{next(iter(merge.replaced))} was trained whole (modules_to_save), and such tensors cannot be added up in "
            "one adapter; write a model instead"
        )
    first, tensors, ranks = adapters[0], {}, {}
    for name in merge.changed:
        joined = _joined(name, merge)
        module = name.removesuffix(".weight")
        ranks[module] = len(joined.a)
        for key, tensor in first.named_factors(module, joined.a, joined.b * joined.scale).items():
            tensors[key] = tensor.to(merge.settings.dtype or torch.float32).contiguous()
    for name, build in merge.replaced.items():
        tensors[f"base_model.model.{name}"] = build().contiguous()
    with new_folder(folder, replace=replace) as work:
        save_file(tensors, work / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(work / ADAPTER_CONFIG, _config(first, merge, ranks))
        write_json(work / MERGE_FILE, dict(metadata))
        for file in first.folder.glob("*token*"):
            shutil.copyfile(file, work / file.name)


def _joined(name: str, merge: StreamMerge) -> LowRank:
    """The weighted sum of a tensor's pruned deltas as one product; its scale is 1."""
    parts, settings = merge.parts(name), merge.settings
    total = sum(part.source.weight_of(name) for part in parts) if settings.normalise else 1.0
    truncating = next((part.method for part in parts if isinstance(part.method, Rank)), None)
    a: list[Tensor] = []
    b: list[Tensor] = []
    for part in parts:
        left = _factors(name, part, whole=truncating is not None)
        a.append(left.a)
        b.append(left.b * (left.scale * part.source.weight_of(name) * settings.scale / (total or 1.0)))
    joined = LowRank(parts[0].delta.place, torch.cat(a), torch.cat(b, 1), 1.0)
    return joined if truncating is None else truncating.on_factors(joined, DeltaContext())


def _factors(name: str, part: Part, *, whole: bool) -> LowRank:
    if not isinstance(part.delta, LowRank):
        raise UnsupportedModelError(
            f"{part.source.tuned.folder}: what it adds to {name} is no product of factors (DoRA); write a model instead"
        )
    if whole or part.method is None:
        return part.delta
    found = part.method.on_factors(part.delta, part.context)
    if found is None:
        raise ExportError(
            f"what {type(part.method).__name__.lower()} leaves of {name} is no product of factors; an adapter is kept "
            f"one by {_CAN}, or write a model"
        )
    return found


def _config(first: Adapter, merge: StreamMerge, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The first adapter's, with every module's rank and a scale of 1."""
    largest = max(ranks.values())
    patterns = {module: rank for module, rank in ranks.items() if rank != largest}
    return {
        **first.config,
        "base_model_name_or_path": str(merge.base),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
    }
