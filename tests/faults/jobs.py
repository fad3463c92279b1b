"""The jobs that are killed, each small and real, each with its files: a whole run, a merge, an export, scores.

A job is started with the same call until it ends well; what it leaves behind must not depend on how often it died.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from prunetune.cli.main import app
from prunetune.config.schema import RunConfig
from prunetune.core.files import write_text
from prunetune.data.store import read_scores
from prunetune.export.stream_merge import MERGE_FILE, MergeSettings
from prunetune.export.write import METADATA_FILE, export_model
from prunetune.model.plan import Plan
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.folder import RESOLVED, resolved_text
from prunetune.pipeline.loading import load_tokenizer, load_trained
from prunetune.pipeline.merge_request import MergeRequest
from prunetune.pipeline.merge_run import merge_run
from prunetune.pipeline.run import run
from prunetune.pipeline.score_run import score_run
from prunetune.pipeline.select_run import select_run
from prunetune.train.checkpoint import ADAPTER_FILE, MARKER, newest
from tests.support import tiny_folder, tiny_model, tiny_rows, write_rows
from tests.train.joint_runs import metrics, timeless

STEPS = 6


def prepare(root: Path) -> None:
    """Model, adapter and rows that all jobs share."""
    tiny_folder(root / "model", tie_word_embeddings=True)
    write_rows(root / "rows.jsonl", tiny_rows(48))
    (root / "prose.txt").write_text(" ".join(f"w{i % 90}" for i in range(400)))
    torch.manual_seed(3)
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(tiny_model(tie_word_embeddings=True), adapters).save_pretrained(root / "adapter")


def configuration(root: Path, folder: Path, keep: int = 1) -> RunConfig:
    """A run that is compared with nothing: checkpoints every other step, a refitted freeze, an export, a report."""
    values: dict[str, Any] = {
        "model": str(root / "model"),
        "data": {"train": str(root / "rows.jsonl"), "validation_rows": 6, "general_text": str(root / "prose.txt")},
        "target": {"kept": "60%", "align": 8},
        "compensation": {"method": "refit", "tokens": 256},
        "phases": {"warmup": 0.1, "search": 0.4},
        "train": {
            "max_steps": STEPS,
            "batch_size": 4,
            "max_length": 32,
            "bf16": False,
            "save_every": 2,
            "keep_checkpoints": keep,
        },
        "lora": {"rank": 4, "dropout": 0.1},
        "evaluate": {"enabled": False},
        "export": {"dtype": "float32", "verify": False, "shard_size": 60_000},
        "folder": folder,
    }
    return RunConfig(**values)


def _run(root: Path, folder: Path) -> None:
    run(configuration(root, folder), resume=(folder / RESOLVED).exists())


def _kept(root: Path, folder: Path) -> None:
    # With every checkpoint, so that those which rotation would take away can be compared.
    run(configuration(root, folder, keep=STEPS), resume=(folder / RESOLVED).exists())


def _command(root: Path, folder: Path) -> None:
    """`prunetune train`, for what the command line makes of a fault."""
    settings = folder.with_suffix(".yaml")
    write_text(settings, resolved_text(configuration(root, folder, keep=STEPS)))
    app(["train", str(settings), *(["--resume"] if (folder / RESOLVED).exists() else [])])


def _merge(root: Path, folder: Path) -> None:
    settings = MergeSettings(shard_size=60_000)
    request = MergeRequest([root / "adapter"], str(root / "model"), delta="dare", options={"drop": 0.5})
    merge_run(MergeRequest(**{**vars(request), "settings": settings}), folder / "merged", overwrite=True)


def _export(root: Path, folder: Path) -> None:
    # The proof of an export runs in a process of its own, which nobody kills here.
    prepared = resolve_model(str(root / "model"))
    model, plan = load_trained(root / "whole" / "kept", prepared, "float32")
    tokenizer = load_tokenizer(prepared)
    for _ in ("made", "replaced"):
        export_model(model, tokenizer, folder / "again", shard_size=60_000, plan=plan, replace=True, verify=False)


def _score(root: Path, folder: Path) -> None:
    score_run(str(root / "rows.jsonl"), str(root / "model"), folder / "scores", max_length=32)
    select_run(folder / "scores", folder / "chosen", replace=True, samples_method="loss", samples_kept=0.5)


JOBS: dict[str, Callable[[Path, Path], None]] = {
    "run": _run,
    "kept": _kept,
    "command": _command,
    "merge": _merge,
    "export": _export,
    "score": _score,
}


# ---- what comes out, and what must never be there


def outcome(job: str, folder: Path) -> dict[str, Any]:
    """Everything that a finished job is judged by: digests of weights and plans, metrics without times."""
    if job in ("run", "kept", "command"):
        last = newest(folder / "train", folder / "train" / "freeze")
        assert last is not None
        return {
            "adapter": _digest(last / ADAPTER_FILE),
            "plans": [_plan(folder / place) for place in ("plan.json", "train/freeze/plan.json", "compact/plan.json")],
            "metrics": timeless(metrics(folder)),
            "export": _weights(folder / "compact"),
            "report": (folder / "report.html").is_file() and (folder / "README.md").is_file(),
        }
    if job == "merge":
        return {"merged": _weights(folder / "merged"), "config": (folder / "merged" / "config.json").read_text()}
    if job == "export":
        return {"export": _weights(folder / "again"), "plan": _plan(folder / "again" / "plan.json")}
    scores = read_scores(folder / "scores")
    columns = {name: column.tolist() for name, column in scores.table.tokens.items()}
    audit = pq.read_table(folder / "chosen" / "audit.parquet").to_pylist()
    return {"ids": list(scores.table.ids), "tokens": columns, "audit": audit}


def half_written(job: str, folder: Path, whole: dict[str, Any], adapters: dict[str, str]) -> list[str]:
    """What stands there under a final name and is not the whole thing.

    Args:
        whole: ``outcome`` of the job that was never killed.
        adapters: digest of the adapter in every checkpoint that the uninterrupted run wrote.
    """
    faults = []
    for name, wanted in (("compact", "export"), ("merged", "merged"), ("again", "export")):
        if (folder / name).exists() and wanted in whole and _weights(folder / name) != whole[wanted]:
            faults.append(f"{name} is not whole")
        mark = METADATA_FILE if name != "merged" else MERGE_FILE
        if (folder / name).exists() and not (folder / name / mark).is_file():
            faults.append(f"{name} has no {mark}")
    freeze = folder / "train" / "freeze"
    if freeze.exists() and _plan(freeze / "plan.json") != whole["plans"][0]:
        faults.append("freeze has another plan")
    if freeze.exists() and not (freeze / "checkpoint" / MARKER).is_file():
        faults.append("freeze has no checkpoint")
    found = newest(folder / "train", freeze) if (folder / "train").is_dir() else None
    if found is not None and _digest(found / ADAPTER_FILE) != adapters[_place(found)]:
        faults.append(f"{found.name} passes for whole and has another adapter")
    for path in folder.rglob("*.json"):
        if not any(part.startswith((".", "checkpoint-")) for part in path.relative_to(folder).parts):
            try:
                json.loads(path.read_text())
            except ValueError:
                faults.append(f"{path.name} is half a file")
    return faults


def adapters(folder: Path) -> dict[str, str]:
    """Digest of the adapter in every checkpoint of a run folder, the freeze's included."""
    found = [*folder.glob("train/checkpoint-*"), folder / "train" / "freeze" / "checkpoint"]
    return {_place(path): _digest(path / ADAPTER_FILE) for path in found}


def _place(checkpoint: Path) -> str:
    return f"{checkpoint.parent.name}/{checkpoint.name}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plan(path: Path) -> str:
    return Plan.load(path).digest()


def _weights(folder: Path) -> dict[str, str]:
    """Tensor by tensor, so that a file's unused bytes do not matter."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.name}:{name}"] = hashlib.sha256(
                tensor.contiguous().view(torch.uint8).numpy().tobytes()
            ).hexdigest()
    return found
