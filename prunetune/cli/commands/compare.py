"""`prunetune compare`: recipes side by side on the same data, budget, steps and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunetune.cli.commands._arguments import Overrides


def compare(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="YAML file with a `compare` section, e.g. configs/compare/medquad.yaml"),
    ],
    overrides: Overrides = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="ID", help="run this one cell here, and write no report")
    ] = None,
    dry: Annotated[bool, typer.Option("--list", help="list the runs and stop")] = False,
) -> None:
    """Run recipes on the same data, budget, steps and seeds, one process each; finished ones are not run again."""
    from prunetune.core.console import console
    from prunetune.pipeline.compare_run import budget, compare_recipes, read_comparison
    from prunetune.report.comparison import comparison_table

    if dry:
        for cell in read_comparison(config, overrides or []).cells:
            console().print(
                f"{cell.id}  ({cell.label}{budget(cell)}, seed {cell.seed})", highlight=False, soft_wrap=True
            )
        return
    results = compare_recipes(config, overrides or [], only=only)
    if only is None:
        console().print(comparison_table(results))
