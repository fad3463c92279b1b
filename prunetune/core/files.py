"""Writing without ever leaving half a file: to a temporary name beside the target, then rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside ``target`` that takes its name when the block ends well.

    On any error the temporary folder is removed and whatever stood at ``target`` is untouched.

    Raises:
        FileExistsError: ``target`` exists, or came to exist meanwhile, and ``replace`` is false.
    """
    target = Path(target)
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if not target.exists():
            os.rename(temporary, target)
        elif replace:
            exchange(temporary, target)
        else:
            raise FileExistsError(f"{target} exists")
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def exchange(temporary: Path, target: Path) -> None:
    """Puts one folder in another's place; what stood there goes only once the new one is there."""
    retired = temporary.with_suffix(".old")
    os.rename(target, retired)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(retired, target)
        raise
    shutil.rmtree(retired)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Free space of the disk that ``path`` (or its nearest existing parent) is on."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
