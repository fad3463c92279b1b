"""Evaluating finished models by name on a data file, outside any run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.core.records import EvalResult
from prunetune.data import prepare, prose, sources, split
from prunetune.evaluate.harness import EvalSettings, compare, save_evaluation
from prunetune.model.resolve import resolve_model
from prunetune.pipeline.quiet import quiet_libraries


def compare_models(
    names: Sequence[str],
    data: str,
    *,
    rows: int,
    max_length: int,
    speed: bool = True,
    out: Path | None = None,
) -> list[EvalResult]:
    """Measures models on the same rows; the first is what changes refer to.

    Args:
        names: model folders, hub ids or short names.
        data: a data file, a saved datasets folder, or a hub id; its held-out split if it has one.
        rows: at most so many rows, drawn by their content alone.
        max_length: tokens of a row.
        out: JSON file for all numbers.

    Raises:
        DataError: the rows cannot be read. UnsupportedModelError: a model is not found or not supported.
    """
    quiet_libraries()
    folders = {}
    for name in names:
        label = Path(name).name
        while label in folders:
            label += "'"
        folders[label] = resolve_model(name).folder
    settings = EvalSettings(max_length=max_length)
    held_out = read_rows(data, next(iter(folders.values())), rows)
    results = compare(folders, held_out, prose.general_text(), speed=speed, settings=settings)
    if out is not None:
        save_evaluation(out, results, settings)
    return results


def read_rows(data: str, model_folder: Path, most: int) -> list[dict[str, Any]]:
    """Rows in the form that the harness takes, for the model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    splits = sources.read(data, "--data")
    given = sources.held_out_rows(splits) or splits.get("test") or sources.training_rows(splits)
    part, _ = prepare.convert(given, "auto", bool(tokenizer.chat_template))
    return part.pick(split.sample(part.examples, most, "evaluation rows")).examples
