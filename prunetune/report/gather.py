"""Everything the reports need, read from a run folder once; whatever is missing is left out.

The files are those of a run folder: metrics.jsonl, selection.jsonl, plan.json, evaluation.json, resolved.yaml,
versions.json, delta.json, and scores.safetensors of the freeze.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from prunetune.core.files import read_json
from prunetune.core.records import EvalResult
from prunetune.model.plan import Plan
from prunetune.model.units import parse_site
from prunetune.report.online import OnlineSelection, read_online

FREEZE_FOLDER = Path("train") / "freeze"
PHASES = ("warmup", "search", "recover")


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says.

    Args:
        folder: the run folder.
        metrics: one mapping a log entry, in order of steps.
        plan: the frozen plan, or None if nothing was pruned.
        scores: site -> (U,) float32 at the freeze; empty if there is no such file.
        results: of evaluation.json, the base first and the compact model last.
        settings: how the evaluation was done.
        config: text of resolved.yaml.
        versions: package or tool -> version.
        facts: what the caller knows beyond the folder; see ``write_reports``.
        delta: of delta.json, what dropping a part of what was learnt costs; empty if nothing was dropped.
        online: what choosing rows and tokens while training came to; None if nothing was chosen.
    """

    folder: Path
    metrics: tuple[dict[str, Any], ...]
    plan: Plan | None
    scores: dict[str, np.ndarray[Any, Any]]
    results: tuple[EvalResult, ...]
    settings: dict[str, Any]
    config: str
    versions: dict[str, Any]
    facts: dict[str, Any]
    delta: dict[str, Any] = field(default_factory=dict)
    online: OnlineSelection | None = None


def gather(folder: Path, facts: Mapping[str, Any] | None = None) -> RunRecord:
    """Reads a run folder.

    Raises:
        PlanMismatchError: there is a plan file, but it is not a plan.
    """
    folder = Path(folder)
    results, settings = read_evaluation(folder / "evaluation.json")
    plan_file = _first_existing(folder / "plan.json", folder / FREEZE_FOLDER / "plan.json")
    scores_file = folder / FREEZE_FOLDER / "scores.safetensors"
    config_file, versions_file = folder / "resolved.yaml", folder / "versions.json"
    return RunRecord(
        folder=folder,
        metrics=read_metrics(folder / "metrics.jsonl"),
        plan=Plan.load(plan_file) if plan_file else None,
        scores=read_scores(scores_file) if scores_file.exists() else {},
        results=results,
        settings=settings,
        config=config_file.read_text(encoding="utf-8") if config_file.exists() else "",
        versions=read_json(versions_file) if versions_file.exists() else {},
        facts=dict(facts or {}),
        delta=read_json(delta_file) if (delta_file := folder / "delta.json").exists() else {},
        online=read_online(folder / "selection.jsonl", (facts or {}).get("samples") or "the selection"),
    )


def read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    """The log entries of metrics.jsonl that have a step; a last line cut short by a crash is left out."""
    if not path.exists():
        return ()
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int | float):
            entries.append(entry)
    return tuple(sorted(entries, key=lambda entry: entry["step"]))


def read_scores(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """site -> (U,) float32 from a safetensors file of scores or gates; other tensors are left out."""
    found = {}
    for name, values in load_file(path).items():
        try:
            parse_site(name)
        except ValueError:
            continue
        found[name] = values.astype(np.float32).reshape(-1)
    return found


def read_evaluation(path: Path) -> tuple[tuple[EvalResult, ...], dict[str, Any]]:
    """(results, settings) of evaluation.json; empty if there is none."""
    if not path.exists():
        return (), {}
    raw = read_json(path)
    results = tuple(EvalResult(entry["label"], Path(entry["folder"]), entry["numbers"]) for entry in raw["results"])
    return results, dict(raw.get("settings", {}))


def phase_spans(metrics: tuple[dict[str, Any], ...]) -> list[tuple[str, float, float]]:
    """(phase, first step, last step) of each stretch of one phase; it begins where the one before ended."""
    spans: list[tuple[str, float, float]] = []
    for entry in metrics:
        phase, step = entry.get("phase"), float(entry["step"])
        if phase is None:
            continue
        if spans and spans[-1][0] == phase:
            spans[-1] = (phase, spans[-1][1], step)
        else:
            spans.append((str(phase), spans[-1][2] if spans else 0.0, step))
    return spans


def series(metrics: tuple[dict[str, Any], ...], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one number over the entries that have it and where it is finite."""
    found = [
        (float(entry["step"]), float(entry[name]))
        for entry in metrics
        if isinstance(entry.get(name), int | float) and np.isfinite(entry[name])
    ]
    return [step for step, _ in found], [value for _, value in found]


def _first_existing(*paths: Path) -> Path | None:
    return next((path for path in paths if path.exists()), None)
