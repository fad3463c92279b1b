"""`prunetune export`: the compact model of a finished run, again or to another budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Base = Literal["trained", "source"]


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, e.g. runs/quickstart")],
    out: Annotated[Path, typer.Option("--out", help="folder to write")],
    target: Annotated[
        str | None, typer.Option("--target", help="another budget from the same scores, e.g. 80%")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: as in the run")
    ] = None,
    base: Annotated[
        Base | None, typer.Option("--base", help="a quantised run's adapters are merged onto these weights")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a former export there")] = False,
) -> None:
    """Write the compact model of a run folder; --target cuts to another budget from the same scores."""
    _check(out, target, overwrite)

    from prunetune.pipeline.export_run import export_run

    export_run(run, out, target=target, dtype=dtype, base=base, replace=overwrite)


def _check(out: Path, target: str | None, overwrite: bool) -> None:
    """Faults that need no model, before seconds are spent on one."""
    from prunetune.core.errors import ConfigError, Problem
    from prunetune.core.sizes import parse_fraction

    problems = []
    if out.exists() and not overwrite:
        problems.append(Problem(f"{out} exists; name another folder, or add --overwrite to replace it", "--out"))
    try:
        kept = parse_fraction(target) if target is not None else 1.0
        if not 0 < kept <= 1:
            problems.append(Problem(f"{target} is not above 0% and at most 100%", "--target"))
    except ValueError as error:
        problems.append(Problem(str(error), "--target"))
    if problems:
        raise ConfigError(problems)
