"""One process at a time in a folder: a lock beside it that the system takes back when its holder dies."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from prunetune.core.errors import FolderInUseError

# Workers of a killed process hold its lock until they notice, within a moment.
_PATIENCE_SECONDS = 1.0


def lock_path(folder: Path) -> Path:
    """Where the lock of a folder is."""
    return folder.parent / f".{folder.name}.lock"


@contextlib.contextmanager
def only_one(folder: Path, *, when: bool = True) -> Iterator[None]:
    """Holds the lock of ``folder`` for the block, if ``when``. It need not exist, and may be replaced meanwhile.

    On one host, and across hosts where the file system shares locks (NFS from version 4, Lustre, CephFS). A killed
    holder's lock is free at once; only where a file system has no locks at all does a marker take their place, which
    another process of the holder's host may break, and nobody else.

    Raises:
        FolderInUseError: another process holds it; says which one.
    """
    if not when:
        yield
        return
    from filelock import FileLock, SoftFileLock, Timeout

    path = lock_path(Path(folder).absolute())
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = FileLock(path, timeout=_PATIENCE_SECONDS, is_singleton=False)
    try:
        holder.acquire()
    except Timeout as error:
        raise FolderInUseError(
            f"{folder} is in use: {_who(path)} works in it. Wait until it is done, stop it, or name another folder"
        ) from error
    # A marker's content is the library's own.
    native = not isinstance(holder, SoftFileLock)
    try:
        with contextlib.suppress(OSError):
            who = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
            if native:
                path.write_text(json.dumps(who), encoding="utf-8")
        yield
    finally:
        # Whoever waits for the lock looks whether the file that it locked still has its name.
        with contextlib.suppress(OSError):
            if native:
                path.unlink()
        holder.release()


def _who(path: Path) -> str:
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['process']} on {who['host']} (since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
