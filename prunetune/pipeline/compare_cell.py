"""One cell of a comparison, in this process: prune or train as its recipe says, then measure."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from prunetune.config.comparison import Cell
from prunetune.config.recipe import BASE, DENSE, JOINT, ONE_SHOT
from prunetune.core.records import DataBundle, PreparedModel
from prunetune.data.load import load_bundle
from prunetune.evaluate.harness import quality
from prunetune.model.architecture import describe
from prunetune.model.budget import decoder_params, full_shape, total_params
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.compare_folder import PRUNED, TRAIN, begin, fingerprint
from prunetune.pipeline.compare_request import one_shot_request
from prunetune.pipeline.loading import load_base, load_tokenizer
from prunetune.pipeline.prune_run import prune_once
from prunetune.pipeline.quiet import quiet_libraries
from prunetune.pipeline.run import METRICS, eval_settings, train, trained_seconds
from prunetune.pipeline.steps import run_steps


def run_cell(cell: Cell) -> dict[str, Any]:
    """Runs one cell and measures what came out; one that was stopped with these settings goes on where it was.

    Returns:
        label, kind, kept (asked for), seed, steps, kept_decoder and params_total (reached), domain_ppl, general_ppl
        and the other numbers of ``quality``, seconds (of the optimizer steps), peak_bytes (of this process, or
        of the GPU).
    """
    quiet_libraries()
    begin(cell)
    config = cell.config
    dense = resolve_model(config.model.name, config.model.revision)
    tokenizer = load_tokenizer(dense)
    data = load_bundle(
        config.data,
        tokenizer=tokenizer,
        max_length=config.train.max_length,
        seed=config.seed,
        completion_only=config.train.completion_only,
    )
    model, steps = _model(cell, dense, tokenizer, data)
    rows = list(data.validation.select(range(min(config.evaluate.rows, len(data.validation)))))
    numbers = quality(cell.label, model, tokenizer, rows, data.general_text, eval_settings(config))
    arch, whole = describe(model.config), describe(dense.config)
    kept = decoder_params(arch, full_shape(arch)) / decoder_params(whole, full_shape(whole))
    return {
        "id": cell.id,
        "label": cell.label,
        "kind": cell.kind,
        "kept": cell.kept,
        "seed": cell.seed,
        "steps": steps,
        "kept_decoder": kept,
        "params_total": total_params(arch, full_shape(arch)),
        "seconds": _trained_seconds(cell),
        "peak_bytes": _peak_bytes(),
        "fingerprint": fingerprint(cell),
        **numbers,
    }


def _model(cell: Cell, dense: PreparedModel, tokenizer: Any, data: DataBundle) -> tuple[Any, int]:
    """(the trained model, adapters attached; optimizer steps)."""
    config = cell.config
    if cell.kind == BASE:
        return load_base(dense, "float32"), 0
    start, prune = dense, None
    if cell.kind == JOINT:
        prune = config.prune()
    elif cell.kind == ONE_SHOT:
        start = _pruned(cell, dense, data)
    else:
        assert cell.kind == DENSE
    trainer = train(config, start, tokenizer, data, prune, config.folder / TRAIN, resume=True)
    trainer.end()
    return trainer.model, run_steps(config.train, prune, len(data.train))


def _pruned(cell: Cell, dense: PreparedModel, data: DataBundle) -> PreparedModel:
    """The base, pruned in one shot on the training rows."""
    folder = cell.config.folder / PRUNED
    if not folder.exists():
        prune_once(one_shot_request(cell, str(dense.folder), list(data.train)))
    return resolve_model(str(folder))


def _trained_seconds(cell: Cell) -> float:
    """Read from the steps' own records, so that a run that was stopped and went on counts whole."""
    folder = cell.config.folder
    return 0.0 if cell.kind == BASE else trained_seconds((folder if cell.kind == JOINT else folder / TRAIN) / METRICS)


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
