"""`prunetune merge` and `prunetune delta info`: names to folders, calibration if a method wants it, then the merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from prunetune.core.console import note, warn
from prunetune.core.errors import ConfigError, DataError, Problem, suggest
from prunetune.core.files import sha256
from prunetune.core.sizes import format_bytes
from prunetune.data import prepare, sources
from prunetune.export.combine import HOWS
from prunetune.export.stream_merge import MergeSettings, Source, StreamMerge
from prunetune.methods.deltas import build_delta, check_delta
from prunetune.methods.deltas.darex_q import DarexOptions, DarexQ
from prunetune.model.architecture import describe
from prunetune.model.delta_file import DeltaFile, base_fingerprint, save_delta
from prunetune.model.delta_inputs import measure_inputs
from prunetune.model.deltas import Delta, alignment
from prunetune.model.plan import Plan
from prunetune.model.resolve import resolve_model
from prunetune.model.shards import ShardReader
from prunetune.model.surgery import Surgery
from prunetune.model.token_rows import token_rows
from prunetune.model.tuned import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Tuned, open_tuned
from prunetune.pipeline.loading import load_base, load_tokenizer
from prunetune.pipeline.quiet import quiet_libraries

# Above this mean change of a weight the base is likely not the one that was tuned, or training went on for long.
_LARGE_CHANGE = 5e-3
_CALIBRATION_TOKENS = 8192
DROPS = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class MergeRequest:
    """What is merged how; as the command line takes it.

    Args:
        folders: adapter or model folders. base: folder or name of the base.
        how: name in HOWS. weights: of each folder; None: all 1.
        delta: delta method; None: the one that ``how`` stands for. options: its options.
        plan: plan.json by which the base was pruned. calibration: rows for methods that look at inputs.
    """

    folders: Sequence[Path]
    base: str
    how: str = "linear"
    weights: Sequence[float] | None = None
    delta: str | None = None
    options: Mapping[str, Any] | None = None
    plan: Path | None = None
    calibration: str | None = None
    settings: MergeSettings = field(default_factory=MergeSettings)

    def problems(self) -> list[Problem]:
        """Everything that cannot work, before anything is read."""
        found = []
        if self.how not in HOWS:
            return [Problem(f"there is no way of merging {self.how!r}; {suggest(self.how, HOWS)}", "--how")]
        if self.weights is not None and len(self.weights) != len(self.folders):
            found.append(
                Problem(f"{len(self.weights)} weights for {len(self.folders)} models; give one each", "--weights")
            )
        if len({folder.resolve() for folder in self.folders}) < len(self.folders):
            found.append(Problem("the same folder is named twice; raise its weight instead", "SOURCES"))
        if HOWS[self.how].consensus and len(self.folders) == 1:
            found.append(
                Problem(f"{self.how} lets models vote on signs; with one model take linear and --delta", "--how")
            )
        found += check_delta(self.method, self.method_options)
        return found

    @property
    def method(self) -> str:
        """Name of the delta method."""
        return self.delta or HOWS[self.how].delta

    @property
    def method_options(self) -> dict[str, Any]:
        """Its options: the user's before those of the way of merging."""
        preset = HOWS[self.how].options if self.method == HOWS[self.how].delta else {}
        return {**preset, **(self.options or {})}


def merge_run(request: MergeRequest, out: Path, *, overwrite: bool = False) -> None:
    """Merges and writes ``out``.

    Raises:
        ConfigError: settings that cannot work, all at once.
        PrunetuneError: folders that do not fit each other, no space, numbers that are not finite.
    """
    merge = ready(request)
    _warn_of_large_changes(merge)
    merge.write(out, metadata(request, merge), replace=overwrite)
    note(f"merged {len(request.folders)} model(s) into {len(merge.changed)} matrices: {out}")


def save_run(request: MergeRequest, out: Path, *, drop: float) -> None:
    """`prunetune delta save`: what random dropping leaves of one adapter or model, in a file without positions.

    Survivors are divided by 1 - drop when the file is applied, or by the closed form's q if there are calibration rows.

    Raises:
        DataError: ``out`` exists, or several sources are named.
    """
    if len(request.folders) != 1:
        raise DataError("a delta file holds one adapter or model; save each one apart")
    if out.exists():
        raise DataError(f"{out} exists; name another file")
    merge = ready(request)
    [source] = merge.sources
    method = DarexQ(DarexOptions(drop=drop, q="closed_form" if request.calibration else (1 - drop) or 1.0))
    divisors: dict[str, float] = {}
    for name in merge.changed:
        context = source.context(name, merge.settings.seed)
        known = request.calibration is None or context.inputs is not None
        divisors[name] = method.divisor(merge.delta_of(name)[0][1], context) if known else 1 - drop
    dtype = merge.settings.dtype or torch.bfloat16
    save_delta(out, source.tuned, merge.slices, drop=drop, divisors=divisors, seed=merge.settings.seed, dtype=dtype)
    before = sum(file.stat().st_size for file in request.folders[0].glob("*.safetensors"))
    after = out.stat().st_size
    note(f"{out}: {format_bytes(after)}, from {format_bytes(before)}")
    if after > before:
        warn(
            "the file is larger than what it was made from: a low-rank adapter is small already; drop more, or keep it"
        )


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each source's random masks: its folder's; of equals the later ones are numbered."""
    names = [folder.name for folder in folders]
    return [name if name not in names[:place] else f"{name}#{place}" for place, name in enumerate(names)]


def _open(path: Path) -> Tuned:
    """The adapter, model or delta file at a path."""
    return DeltaFile(path) if path.is_file() else open_tuned(path)


def _warn_of_large_changes(merge: StreamMerge) -> None:
    """One warning, from a few matrices' first rows."""
    for name in merge.changed[:: max(1, len(merge.changed) // 8)]:
        for source, delta in merge.delta_of(name):
            mean = float(delta.rows(0, min(64, delta.shape[0])).abs().mean())
            if mean > _LARGE_CHANGE:
                warn(
                    f"{source.tuned.folder} changes {name} by {mean:.1e} on average: the base may not be the one it "
                    "was tuned from, or it was trained for long; random dropping is not safe at this size"
                )
                return


def ready(request: MergeRequest) -> StreamMerge:
    """The merge, checked and calibrated, not yet written."""
    quiet_libraries()
    if problems := request.problems():
        raise ConfigError(problems)
    how, prepared = HOWS[request.how], resolve_model(request.base)
    surgery = _surgery(request.plan, prepared.config)
    method = build_delta(request.method, request.method_options)
    weights = request.weights or [1.0] * len(request.folders)
    opened = zip(request.folders, weights, _names(request.folders))
    found = [Source(_open(folder), weight, method, name) for folder, weight, name in opened]
    settings = replace(request.settings, consensus=how.consensus, normalise=how.normalise)
    merge = StreamMerge(prepared.folder, found, settings, surgery)
    if not method.calibrated and request.calibration is None:
        return merge
    if request.calibration is None:
        raise ConfigError([Problem(f"{request.method} looks at real inputs; name a file of rows", "--calibration")])
    measured = _measure(merge, prepared, request.calibration)
    found = [replace(source, measured=measured.get(source.name, {})) for source in found]
    return StreamMerge(prepared.folder, found, settings, surgery)


def delta_info(request: MergeRequest) -> list[dict[str, Any]]:
    """Facts about every changed matrix: sizes, alignment, predicted output error of random dropping.

    Returns:
        One record a matrix: name, shape, mean_abs (of the delta), relative (its norm over the base's), ``R`` and
        ``suggested_drop`` if there are calibration rows, and ``errors``: drop rate -> relative output error.
    """
    merge = ready(request)
    records = []
    for name in merge.changed:
        base = merge.base_norm(name)
        for source, delta in merge.delta_of(name):
            records.append({"name": name, "model": source.name, **_facts(source, name, delta, base)})
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


def metadata(request: MergeRequest, merge: StreamMerge) -> dict[str, Any]:
    """What was merged how, for the folder that comes out."""
    return {
        "format": "prunetune-merge",
        "base": request.base,
        "base_fingerprint": base_fingerprint(merge.slices.reader),
        "models": [
            {"name": source.name, "weight": source.weight, "fingerprint": _fingerprint(folder)}
            for folder, source in zip(request.folders, merge.sources)
        ],
        "how": request.how,
        "delta": {"method": request.method, **request.method_options},
        "scale": merge.settings.scale,
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


def _measure(merge: StreamMerge, prepared: Any, calibration: str) -> dict[str, dict[str, Any]]:
    """Source name -> tensor -> (inputs, energy), from the base's own activations."""
    tokenizer = load_tokenizer(prepared)
    model = load_base(prepared, "float32").eval()
    rows = sources.training_rows(sources.read(calibration, "--calibration"))
    part, _ = prepare.convert(rows, "auto", bool(tokenizer.chat_template))
    encoded, batches, tokens = token_rows(tokenizer, part.examples, 512), [], 0
    for row in encoded:
        ids = torch.tensor([row.input_ids])
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        tokens += ids.numel()
        if tokens >= _CALIBRATION_TOKENS:
            break
    if not batches:
        raise DataError(f"--calibration {calibration} has no usable row")
    found: dict[str, dict[str, Any]] = {source.name: {} for source in merge.sources}
    for source in merge.sources:
        deltas = {name: delta for name in merge.changed for own, delta in merge.delta_of(name) if own is source}
        found[source.name] = dict(measure_inputs(model, deltas, batches))
    return found
