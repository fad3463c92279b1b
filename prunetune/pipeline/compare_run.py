"""`prunetune compare`: every cell in a process of its own, results kept as they come, one table at the end."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.config.comparison import Cell, Comparison, load_comparison
from prunetune.core.console import note, warn
from prunetune.core.errors import ConfigError, DataError, Problem, suggest
from prunetune.core.files import read_json, write_json
from prunetune.core.lock import only_one
from prunetune.core.sizes import format_fraction
from prunetune.pipeline.checks import check_methods
from prunetune.pipeline.compare_folder import drop_weights, fingerprint
from prunetune.pipeline.compare_request import cell_problems
from prunetune.report.comparison import write_comparison

RESULTS = "results"


def read_comparison(path: Path, overrides: Sequence[str]) -> Comparison:
    """The checked comparison of a file; raises ConfigError."""
    comparison = load_comparison(path, overrides, checks=[check_methods])
    problems = [problem for cell in comparison.cells for problem in cell_problems(cell)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return comparison


def compare_recipes(path: Path, overrides: Sequence[str] = (), *, only: str | None = None) -> list[dict[str, Any]]:
    """Runs the cells that have no result yet, one process each, and writes table, figure and report.

    Args:
        path: see ``load_comparison``. overrides: settings that win over the file.
        only: the id of one cell: it is run in this process and no report is written.

    Returns:
        The results so far; see ``run_cell``.

    Raises:
        ConfigError: the file, or a result in the folder that was made with other settings or data.
        FolderInUseError: another process runs this comparison, or the one cell.
        DataError: some cells failed; the others' results are there, and calling again tries the failed ones.
    """
    comparison = read_comparison(path, overrides)
    if only is not None:
        return [_run_here(comparison, only)]
    # Whoever only reads what is finished waits for nobody.
    with only_one(comparison.folder, when=bool(_waiting(comparison))):
        failed = _run_waiting(comparison, path, overrides)
    if failed:
        again = shlex.join(["prunetune", "compare", str(path), *overrides])
        raise DataError(f"{len(failed)} of {len(comparison.cells)} runs failed ({', '.join(failed)}); again: {again}")
    return results_of(comparison)


def _run_waiting(comparison: Comparison, path: Path, overrides: Sequence[str]) -> list[str]:
    """Runs what has no result and writes the reports; ids of the cells that failed."""
    failed, waiting = [], _waiting(comparison)
    to_do = {cell.id for cell in waiting}
    for cell in comparison.cells:
        if cell.id not in to_do:
            drop_weights(cell)
    note(f"{len(comparison.cells)} runs, {len(waiting)} of them to do; results in {comparison.folder}")
    for number, cell in enumerate(waiting, 1):
        note(f"[bold]{number}/{len(waiting)}[/bold] {cell.label}{budget(cell)}, seed {cell.seed}")
        if not _run_apart(path, overrides, cell.id):
            warn(f"{cell.id} failed; going on with the others")
            failed.append(cell.id)
        _report(comparison)
    _report(comparison)
    return failed


def _waiting(comparison: Comparison) -> list[Cell]:
    return [cell for cell in comparison.cells if _result(comparison, cell) is None]


def _report(comparison: Comparison) -> None:
    """Reports of what is there; a cell without a result is shown as missing."""
    rows = [
        _result(comparison, cell) or {"label": cell.label, "kept": cell.kept, "seed": cell.seed}
        for cell in comparison.cells
    ]
    write_comparison(comparison.folder, rows)


def _run_apart(path: Path, overrides: Sequence[str], only: str) -> bool:
    """Runs one cell in a process of its own, so that its peak memory is its own; whether it succeeded."""
    command = [sys.executable, "-m", "prunetune", "compare", str(path), *overrides, "--only", only]
    return subprocess.run(command).returncode == 0


def results_of(comparison: Comparison) -> list[dict[str, Any]]:
    """The results that are there, in the order of the cells."""
    found = (_result(comparison, cell) for cell in comparison.cells)
    return [result for result in found if result is not None]


def _run_here(comparison: Comparison, only: str) -> dict[str, Any]:
    from prunetune.pipeline.compare_cell import run_cell

    cells = {cell.id: cell for cell in comparison.cells}
    if only not in cells:
        raise ConfigError([Problem(f"there is no run {only!r}; {suggest(only, list(cells))}", "--only")])
    cell = cells[only]
    # Its own lock: single cells may be run beside each other, and one outlives a comparison that was killed.
    with only_one(cell.config.folder):
        result = _result(comparison, cell)
        if result is None:
            result = run_cell(cell)
            write_json(_file(comparison, cell), result)
        drop_weights(cell)
    return result


def _result(comparison: Comparison, cell: Cell) -> dict[str, Any] | None:
    file = _file(comparison, cell)
    if not file.exists():
        return None
    result: dict[str, Any] = read_json(file)
    if result["fingerprint"] != fingerprint(cell):
        message = (
            f"{file} was made with other settings, another base or other rows; set another folder=..., or delete it to "
            f"run {cell.id} again"
        )
        raise ConfigError([Problem(message, "folder")])
    return result


def _file(comparison: Comparison, cell: Cell) -> Path:
    return comparison.folder / RESULTS / f"{cell.id}.json"


def budget(cell: Cell) -> str:
    """``, 60.0% kept``; nothing for a reference."""
    return "" if cell.kept is None else f", {format_fraction(cell.kept)} kept"
