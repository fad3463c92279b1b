"""The stated level order, checked on the imports themselves: they point down only, and stages do not meet."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "prunetune"
LEVELS = {
    "core": 0,
    "config": 1,
    "model": 2,
    "methods": 3,
    "data": 4,
    "train": 4,
    "export": 4,
    "evaluate": 4,
    "report": 4,
    "pipeline": 5,
    "cli": 6,
}
MOST_LINES = 400
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str | None:
    """The layer that a dotted module name belongs to; None outside the package or at its root."""
    names = module.split(".")
    return names[1] if len(names) > 1 and names[0] == "prunetune" else None


def imports_of(path: Path, text: str | None = None) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted module) of every import in a file, wherever it stands, relative ones resolved."""
    package = ["prunetune", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if text is None else text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(name for name in (base, node.module or "") if name)
            # `from prunetune import config` and `from prunetune.model import plan` name modules too.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def faults_of(path: Path, text: str | None = None) -> list[str]:
    """Upward and sideways imports of one file, in words."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = []
    for line, module in imports_of(path, text):
        other = part_of(module)
        if other is None or other == own or other not in LEVELS:
            continue
        if own not in LEVELS:
            found.append(f"{path}:{line}: {own} belongs to no layer and imports {module}")
        elif LEVELS[other] > LEVELS[own]:
            found.append(f"{path}:{line}: {own} (L{LEVELS[own]}) imports upward from {module} (L{LEVELS[other]})")
        elif LEVELS[other] == LEVELS[own]:
            found.append(f"{path}:{line}: {own} imports sideways from {module}; stages meet in pipeline only")
    return found


# The package's root re-exports names of all layers, lazily: it belongs to none.
@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent != PACKAGE], ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_point_down(path: Path) -> None:
    assert faults_of(path) == []


def test_every_folder_has_a_level() -> None:
    folders = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert folders == set(LEVELS)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("core/x.py", "from prunetune.config.schema import RunConfig", "upward"),
        ("core/x.py", "def f():\n    import prunetune.model.plan", "upward"),
        ("core/x.py", "from prunetune import cli", "upward"),
        ("train/x.py", "from prunetune.data.load import load_bundle", "sideways"),
        ("train/x.py", "from ..data import load", "sideways"),
        ("methods/masks/x.py", "from ...train.trainer import T", "upward"),
    ],
)
def test_the_walk_sees_every_form_of_import(file: str, text: str, said: str) -> None:
    [fault] = faults_of(PACKAGE / file, text)
    assert said in fault


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("train/x.py", "from prunetune.methods.masks import MASKS"),
        ("train/x.py", "from . import phases"),
        ("cli/commands/x.py", "from prunetune import __version__"),
        ("methods/masks/x.py", "from . import _scheduled"),
    ],
)
def test_the_walk_allows_what_points_down(file: str, text: str) -> None:
    assert faults_of(PACKAGE / file, text) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_tells_one_thing(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{path} has {lines} lines; split it"
