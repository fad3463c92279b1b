"""`prunetune merge` and `prunetune delta info`: names to folders, calibration and searches, then the merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prunetune.core.console import note, warn
from prunetune.core.errors import ConfigError, DataError, Problem
from prunetune.core.files import sha256
from prunetune.export.adapter_merge import write_adapter
from prunetune.export.combine import HOWS
from prunetune.export.merge_source import Source
from prunetune.export.stream_merge import MergeSettings, StreamMerge
from prunetune.methods.deltas import build_delta
from prunetune.model.architecture import describe
from prunetune.model.delta_file import DeltaFile, base_fingerprint
from prunetune.model.delta_inputs import Inputs
from prunetune.model.deltas import Delta, alignment
from prunetune.model.plan import Plan
from prunetune.model.resolve import resolve_model
from prunetune.model.shards import ShardReader
from prunetune.model.surgery import Surgery
from prunetune.model.tuned import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Tuned, open_tuned
from prunetune.pipeline.merge_quantized import Base, open_base, write_quantized
from prunetune.pipeline.merge_request import MergeRequest

# Above this mean change of a weight the base is likely not the one that was tuned, or training went on for long.
_LARGE_CHANGE = 5e-3
# A base of which more is 0 was pruned entry by entry.
_MANY_ZEROS = 0.1
DROPS = (0.5, 0.9, 0.95, 0.99)


def merge_run(request: MergeRequest, out: Path, *, overwrite: bool = False) -> None:
    """Merges and writes ``out``.

    Raises:
        ConfigError: settings that cannot work, all at once.
        PrunetuneError: folders that do not fit each other, no space, numbers that are not finite.
    """
    found = ready(request)
    merge, facts = found.merge, metadata(request, found.merge, found.options)
    refuse_large_changes(merge, request)
    if request.output == "model":
        ask_about_zeros(merge)
    if request.output == "adapter":
        write_adapter(merge, out, facts, replace=overwrite)
        note(f"{len(request.folders)} adapter(s) made one of {len(merge.changed)} matrices: {out}")
        return
    if found.base.kind is None:
        merge.write(out, facts, replace=overwrite)
    else:
        write_quantized(found.base, merge, found.trained, out, facts, replace=overwrite)
    note(f"merged {len(request.folders)} model(s) into {len(merge.changed)} matrices: {out}")


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each source's random masks: its folder's; of equals the later ones are numbered."""
    names = [folder.name for folder in folders]
    return [name if name not in names[:place] else f"{name}#{place}" for place, name in enumerate(names)]


def _open(path: Path) -> Tuned:
    """The adapter, model or delta file at a path."""
    return DeltaFile(path) if path.is_file() else open_tuned(path)


def refuse_large_changes(merge: StreamMerge, request: MergeRequest) -> None:
    """A delta that is dropped by lot must be small; measured on the first rows of a few matrices.

    Raises:
        DataError: more than half of large changes would be dropped by lot.
    """
    for source in merge.sources:
        means, dropped = [], 0.0
        for name in _sample(merge):
            for part in merge.parts(name):
                if part.source is source:
                    means.append(float(part.delta.rows(0, min(64, part.delta.shape[0])).abs().mean()))
                    if part.method is not None and part.method.random:
                        dropped = max(dropped, float(part.method.options.model_dump()["drop"]))
        size = sum(means) / max(1, len(means))
        if size <= _LARGE_CHANGE:
            continue
        fact = (
            f"{source.tuned.folder} changes weights by {size:.1e} on average, which is large: the base may not be the "
            "one it was tuned from, or it was trained for long"
        )
        if 0.5 < dropped < 1 and not request.allow_large:
            raise DataError(
                f"{fact}. What is left of such changes when {dropped:.0%} are dropped by lot no longer computes the "
                f"same (above {_LARGE_CHANGE:.0e} is known to fail); check --base, keep the largest instead (--delta "
                "magnitude, or wanda with --calibration), drop at most 50%, or insist with --allow-large"
            )
        warn(f"{fact}; random dropping is not safe at this size")


def ask_about_zeros(merge: StreamMerge) -> None:
    """A base that was pruned entry by entry: whether its zeros stay must be said, because both have a price.

    Raises:
        DataError: nobody said it.
    """
    zeros = count = lost = whole = 0.0
    for name in _sample(merge):
        for part in merge.parts(name):
            change = part.delta.rows(0, min(64, part.delta.shape[0]))
            empty = merge.slices.rows(name)(0, len(change)) == 0
            zeros, count = zeros + float(empty.sum()), count + empty.numel()
            lost, whole = lost + float(change[empty].square().sum()), whole + float(change.square().sum())
    share, missing = zeros / max(count, 1), math.sqrt(lost / whole) if whole else 0.0
    fact = f"{share:.0%} of {merge.base} is 0, and {missing:.0%} of the change (by its norm) is there"
    if merge.settings.keep_zeros:
        note(f"{fact}: it is left out, so that what is 0 stays 0")
    elif share > _MANY_ZEROS and merge.settings.keep_zeros is None:
        raise DataError(
            f"{fact}. Say --keep-zeros to leave that out (fine if the sources were trained with these zeros), or "
            "--fill-zeros to merge everything, after which the base is no longer sparse"
        )


def _sample(merge: StreamMerge) -> list[str]:
    """Some matrices that get a delta, from all depths."""
    return merge.changed[:: max(1, len(merge.changed) // 8)]


@dataclass(frozen=True)
class Ready:
    """A merge that was checked and calibrated, not yet written.

    Args:
        merge: as it is written. options: of its method, with nothing left to a search.
        base: what is merged onto. trained: the same merge onto the numbers that the sources saw, in float32, if these
            were quantised.
    """

    merge: StreamMerge
    options: dict[str, Any]
    base: Base
    trained: StreamMerge


def ready(request: MergeRequest) -> Ready:
    """Opens, checks and calibrates everything; searches what is open."""
    if problems := request.problems():
        raise ConfigError(problems)
    how, prepared = HOWS[request.how], resolve_model(request.base)
    base = open_base(prepared, request.quantized, request.onto)
    surgery = _surgery(request.plan, prepared.config)
    opened = [(_open(folder), name) for folder, name in zip(request.folders, _names(request.folders))]
    weights = request.weights or [1.0] * len(request.folders)
    settings = replace(request.settings, consensus=how.consensus, normalise=how.normalise)
    if base.kind is not None and settings.dtype is None:
        settings = replace(settings, dtype=torch.bfloat16)
    exact = replace(settings, dtype=torch.float32)

    def made(
        options: Mapping[str, Any] | None,
        seen: Mapping[str, Mapping[str, Inputs]],
        reader: ShardReader = base.written,
        settings: MergeSettings = settings,
    ) -> StreamMerge:
        method = build_delta("identity", {}) if options is None else build_delta(request.method, options)
        found = [
            Source(tuned, weights[place], method, name, seen.get(name, {}), request.special(place, options))
            for place, (tuned, name) in enumerate(opened)
        ]
        return StreamMerge(prepared.folder, found, settings, surgery, reader)

    options = request.method_options
    seen: Mapping[str, Mapping[str, Inputs]] = {}
    merge = made(options, seen)
    if merge.calibrated and request.calibration is None:
        raise ConfigError([Problem(f"{request.method} looks at real inputs; name a file of rows", "--calibration")])
    if request.calibration is not None:
        # A merge without rows loads no training libraries: they take more memory than the merge.
        from prunetune.pipeline.merge_rows import MergeRows
        from prunetune.pipeline.quiet import quiet_libraries

        quiet_libraries()
        rows = MergeRows(prepared, base.trained, request.calibration)
        seen = rows.measure(merge)
        options = rows.settle(request.method, options, request.by, lambda tried: made(tried, seen))
        merge = made(options, seen)
    return Ready(merge, options, base, made(options, seen, base.trained, exact) if base.kind is not None else merge)


def delta_info(request: MergeRequest) -> list[dict[str, Any]]:
    """Facts about every changed matrix: sizes, alignment, predicted output error of random dropping.

    Returns:
        One record a matrix: name, shape, mean_abs (of the delta), relative (its norm over the base's), ``R`` and
        ``suggested_drop`` if there are calibration rows, and ``errors``: drop rate -> relative output error.
    """
    merge = ready(request).merge
    records = []
    for name in merge.changed:
        base = merge.base_norm(name)
        for part in merge.parts(name):
            records.append({"name": name, "model": part.source.name, **_facts(part.source, name, part.delta, base)})
    return records


def _facts(source: Source, name: str, delta: Delta, base_norm: float) -> dict[str, Any]:
    m, n = delta.shape
    total = square = 0.0
    for _, block in delta.blocks():
        total += float(block.abs().double().sum())
        square += float(block.double().square().sum())
    found = {"shape": [m, n], "mean_abs": total / (m * n), "relative": math.sqrt(square) / max(base_norm, 1e-30)}
    seen = source.measured.get(name)
    if seen is None:
        return found
    spread = alignment(delta, seen.squares, seen.energy)
    errors = {f"{drop:.0%}": math.sqrt(spread * drop / (1 - drop)) for drop in DROPS}
    # Where the predicted error of a layer's change reaches the change itself, nothing of it is left.
    return {**found, "R": spread, "errors": errors, "suggested_drop": 1 / (1 + spread)}


def metadata(request: MergeRequest, merge: StreamMerge, options: Mapping[str, Any]) -> dict[str, Any]:
    """What was merged how, for the folder that comes out; ``options``: with nothing left to a search."""
    return {
        "format": "prunetune-merge",
        "base": request.base,
        "base_fingerprint": base_fingerprint(merge.slices.reader),
        "models": [
            {"name": source.name, "weight": source.weight, "fingerprint": _fingerprint(folder)}
            for folder, source in zip(request.folders, merge.sources)
        ],
        "how": request.how,
        "delta": {"method": request.method, **options},
        "rules": [asdict(rule) for rule in request.rules],
        "quantized": request.quantized,
        "onto": request.onto,
        "scale": merge.settings.scale,
        "keep_zeros": merge.settings.keep_zeros,
        "seed": merge.settings.seed,
        "dtype": str(merge.settings.dtype),
        "shard_size": merge.settings.shard_size,
        "calibration": None if request.calibration is None else _calibration_hash(request.calibration),
        "plan": None if request.plan is None else Plan.load(request.plan).digest(),
    }


def _fingerprint(folder: Path) -> str:
    """Of all of a small file, and of names, shapes and the first row of every matrix of a whole model."""
    if folder.is_file():
        return sha256(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return sha256(folder / ADAPTER_WEIGHTS)
    return base_fingerprint(ShardReader(folder))


def _calibration_hash(name: str) -> str:
    """Of a file's bytes; of a folder or hub id its name."""
    return sha256(Path(name)) if Path(name).is_file() else name


def _surgery(plan: Path | None, config: dict[str, Any]) -> Surgery | None:
    """The cuts of a plan, for a base that was pruned by it: the dense widths stand in the plan."""
    if plan is None:
        return None
    found = Plan.load(plan)
    widths = {name: value for name, value in found.architecture.items() if name != "family"}
    return Surgery(replace(describe(config), **widths), found)
