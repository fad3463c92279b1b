"""`prunetune export`: the compact model of a finished run, again or to another budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, e.g. runs/quickstart")],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    target: Annotated[
        str | None, typer.Option("--target", help="another budget from the same scores, e.g. 80%")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: as in the run")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a former export there")] = False,
) -> None:
    """Write the compact model of a run folder; --target cuts to another budget from the same scores."""
    from prunetune.pipeline.export_run import export_run

    export_run(run, out, target=target, dtype=dtype, replace=overwrite)
