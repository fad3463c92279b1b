"""`prunetune compare`: every cell in a process of its own, results kept as they come, one table at the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.config.comparison import ONE_SHOT, Cell, Comparison, load_comparison
from prunetune.core.console import note, warn
from prunetune.core.errors import ConfigError, DataError, Problem, suggest
from prunetune.core.files import read_json, write_json
from prunetune.pipeline.checks import check_methods, registered_names
from prunetune.report.comparison import write_comparison

RESULTS = "results"


def read_comparison(path: Path, overrides: Sequence[str]) -> Comparison:
    """The checked comparison of a file; raises ConfigError."""
    comparison = load_comparison(path, overrides, checks=[check_methods])
    problems = [problem for cell in comparison.cells for problem in _check_one_shot(cell)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return comparison


def _check_one_shot(cell: Cell) -> list[Problem]:
    if cell.kind != ONE_SHOT:
        return []
    chosen = {"one_shot": (cell.score, "scores"), "allocation": (cell.allocation, "allocation")}
    found = []
    for field, (name, family) in chosen.items():
        known = registered_names(f"prunetune.methods.{family}")
        if name not in known:
            found.append(Problem(f"there is no {name!r}; {suggest(name, known)}", f"compare.recipes.{field}"))
    return found


def compare_recipes(path: Path, overrides: Sequence[str] = (), *, only: str | None = None) -> list[dict[str, Any]]:
    """Runs the cells that have no result yet, one process each, and writes table, figure and report.

    Args:
        path: see ``load_comparison``. overrides: settings that win over the file.
        only: the id of one cell: it is run in this process and no report is written.

    Returns:
        The results so far; see ``run_cell``.

    Raises:
        ConfigError: the file, or a result in the folder that was made with other settings.
        DataError: some cells failed; the others' results are there, and calling again tries the failed ones.
    """
    comparison = read_comparison(path, overrides)
    if only is not None:
        return [_run_here(comparison, only)]
    failed = []
    waiting = [cell for cell in comparison.cells if _result(comparison, cell) is None]
    note(f"{len(comparison.cells)} runs, {len(waiting)} of them to do; results in {comparison.folder}")
    for number, cell in enumerate(waiting, 1):
        note(f"[bold]{number}/{len(waiting)}[/bold] {cell.label}{_budget(cell)}, seed {cell.seed}")
        if not _run_apart(path, overrides, cell.id):
            warn(f"{cell.id} failed; going on with the others")
            failed.append(cell.id)
        write_comparison(comparison.folder, results_of(comparison))
    found = results_of(comparison)
    write_comparison(comparison.folder, found)
    if failed:
        again = " ".join(["prunetune compare", str(path), *overrides])
        raise DataError(f"{len(failed)} of {len(comparison.cells)} runs failed ({', '.join(failed)}); again: {again}")
    return found


def _run_apart(path: Path, overrides: Sequence[str], only: str) -> bool:
    """Runs one cell in a process of its own, so that its peak memory is its own; whether it succeeded."""
    command = [sys.executable, "-m", "prunetune", "compare", str(path), *overrides, "--only", only]
    return subprocess.run(command).returncode == 0


def results_of(comparison: Comparison) -> list[dict[str, Any]]:
    """The results that are there, in the order of the cells."""
    found = (_result(comparison, cell) for cell in comparison.cells)
    return [result for result in found if result is not None]


def _run_here(comparison: Comparison, only: str) -> dict[str, Any]:
    from prunetune.pipeline.compare_cell import drop_weights, run_cell

    cells = {cell.id: cell for cell in comparison.cells}
    if only not in cells:
        raise ConfigError([Problem(f"there is no run {only!r}; {suggest(only, list(cells))}", "--only")])
    result = run_cell(cells[only])
    write_json(_file(comparison, cells[only]), result)
    drop_weights(cells[only])
    return result


def _result(comparison: Comparison, cell: Cell) -> dict[str, Any] | None:
    file = _file(comparison, cell)
    if not file.exists():
        return None
    result: dict[str, Any] = read_json(file)
    if result["fingerprint"] != cell.fingerprint():
        message = f"{file} was made with other settings; set another folder=..., or delete it to run {cell.id} again"
        raise ConfigError([Problem(message, "folder")])
    return result


def _file(comparison: Comparison, cell: Cell) -> Path:
    return comparison.folder / RESULTS / f"{cell.id}.json"


def _budget(cell: Cell) -> str:
    return "" if cell.kept is None else f", {cell.kept:.0%} kept"
