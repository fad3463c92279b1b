"""`prunetune delta save`: what a delta method leaves of one adapter or model, in a small file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from prunetune.core.console import note, warn
from prunetune.core.errors import DataError
from prunetune.core.sizes import format_bytes
from prunetune.export.stream_merge import Part
from prunetune.model.delta_file import Kept, save_delta
from prunetune.pipeline.merge_request import MergeRequest
from prunetune.pipeline.merge_run import ready, refuse_large_changes


def save_run(request: MergeRequest, out: Path) -> None:
    """Prunes, and writes ``out``; says which encoding was the smallest.

    Without a method, entries are dropped by lot; survivors are divided by a q that is searched if there are calibration
    rows, else by 1 - drop.

    Raises:
        DataError: ``out`` exists, or several sources are named.
    """
    if len(request.folders) != 1:
        raise DataError("a delta file holds one adapter or model; save each one apart")
    if out.exists():
        raise DataError(f"{out} exists; name another file")
    if request.delta is None:
        request = replace(request, delta="darex_q" if request.calibration else "dare")
    merge = ready(request).merge
    refuse_large_changes(merge, request)
    [source] = merge.sources
    sizes = save_delta(
        out,
        (_kept(part) for name in merge.changed for part in merge.parts(name)),
        source.tuned.replaced(merge.slices),
        merge.slices.reader,
        method=request.method,
        model=source.name,
        moves_tied_head=source.tuned.moves_tied_head,
        seed=merge.settings.seed,
        dtype=merge.settings.dtype or torch.bfloat16,
    )
    note(_encodings(sizes))
    before = sum(file.stat().st_size for file in request.folders[0].glob("*.safetensors"))
    after = out.stat().st_size
    note(f"{out}: {format_bytes(after)}, from {format_bytes(before)}")
    if after > before:
        warn(
            "the file is larger than what it was made from: a low-rank adapter is small already; drop more, or keep it"
        )


def _kept(part: Part) -> Kept:
    method = part.method
    if method is None:
        return Kept(part.delta)
    drawn = float(method.options.model_dump()["drop"]) if method.drawn else None
    return Kept(method.kept(part.delta, part.context), method.divisor(part.delta, part.context), drawn)


def _encodings(sizes: Mapping[str, Mapping[str, int]]) -> str:
    """What was taken for how many matrices, and what all of them would take in each encoding that can hold them."""
    taken = Counter(next(iter(found)) for found in sizes.values())
    totals = {
        name: sum(found[name] for found in sizes.values())
        for name in ("seed", "gaps", "bitmask", "dense")
        if all(name in found for found in sizes.values())
    }
    chosen = ", ".join(f"{name} for {count} of {len(sizes)} matrices" for name, count in taken.items())
    compared = ", ".join(f"{name} {format_bytes(total)}" for name, total in totals.items())
    return f"smallest encoding: {chosen} (all of them in {compared})"
