"""`prunetune eval`: measurements of a model folder, beside another one on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="model folder, e.g. runs/quickstart/compact")],
    data: Annotated[str, typer.Option("--data", help="held-out rows: .jsonl, .json, .csv, .parquet, ...")],
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="BASE", help="second model, e.g. the base model")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="use at most so many rows")] = 200,
    max_length: Annotated[int, typer.Option(min=8, help="tokens of a row; longer rows are cut")] = 512,
    speed: Annotated[bool, typer.Option(help="measure speed and peak memory too")] = True,
    out: Annotated[Path | None, typer.Option(help="also write all numbers to this JSON file")] = None,
) -> None:
    """Measure perplexity, size and speed of a model, beside another one."""
    from prunetune.core.console import console
    from prunetune.pipeline.compare_models import compare_models
    from prunetune.report.table import before_after_table

    names = [compare, folder] if compare else [folder]
    results = compare_models(names, data, rows=rows, max_length=max_length, speed=speed, out=out)
    console().print(before_after_table(results, title=f"{data}, up to {rows} rows"))
