"""Writing without ever leaving half a file: to a temporary place beside the target, onto the disk, then rename.

A temporary place is a folder ``.NAME.xxxx.partial`` that its process keeps locked. One that nobody has locked is what
a killed process left; the next writer of the same name clears it away.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("No space left", "Disk quota exceeded", "File too large")
_AT_WORKING_FOLDER, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside ``target`` that takes its name when the block ends well.

    On any error, a kill included, whatever stood at ``target`` is untouched, and whole.

    Raises:
        FileExistsError: ``target`` exists, or came to exist meanwhile, and ``replace`` is false.
    """
    target = Path(target)
    recover(target)
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists")
    with _workplace(target) as temporary:
        yield temporary
        if target.exists() and not replace:
            raise FileExistsError(f"{target} exists")
        take_place(temporary, target)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path that becomes ``path`` when the block ends well; on any error ``path`` is untouched."""
    path = Path(path)
    with _workplace(path) as temporary:
        yield temporary / path.name
        sync(temporary / path.name)
        os.replace(temporary / path.name, path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """A locked folder beside ``target``; gone afterwards, unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent, glob.escape(target.name))
    folder, descriptor = _locked_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new folder and the descriptor that keeps its lock; None where the file system has no locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        folder.chmod(0o755)
        descriptor = None
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            # Another process that sweeps here may have come first, between the making and the locking.
            if _lock(descriptor) and os.fstat(descriptor).st_nlink:
                return folder, descriptor
        except OSError:
            if folder.exists():
                if descriptor is not None:
                    os.close(descriptor)
                return folder, None
        if descriptor is not None:
            os.close(descriptor)


def discard(folder: Path) -> None:
    """Deletes a folder; it is gone in one step, so that a kill leaves nothing that looks like one."""
    with _workplace(folder) as place:
        os.rename(folder, place / folder.name)


def sweep(folder: Path, name: str = "*") -> None:
    """Clears away what killed writers of ``name``, or of anything, left in a folder."""
    for remains in folder.glob(f".{name}.*.partial"):
        with _unless_in_use(remains) as abandoned:
            if abandoned:
                shutil.rmtree(remains, ignore_errors=True)


@contextlib.contextmanager
def _unless_in_use(folder: Path) -> Iterator[bool]:
    """Locks a folder for the block; false if a process has it locked, or nobody can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            free = _lock(descriptor)
        except OSError:
            free = False
        yield free
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Tries to lock; the lock ends with the descriptor, so with the process too. OSError: there are no locks here."""
    from filelock import lock_descriptor

    return lock_descriptor(descriptor, blocking=False)


def take_place(temporary: Path, target: Path) -> None:
    """Gives a finished folder its name; what stood there is deleted once the new one is there.

    Replacing is one step where the system can exchange names. Elsewhere it takes two renames, and a kill between them
    is mended by ``recover``.
    """
    sync(temporary)
    if target.exists():
        _exchange(temporary, target)
    else:
        os.rename(temporary, target)
    _sync_folder(target.parent)


def _exchange(temporary: Path, target: Path) -> None:
    if not _exchange_names(temporary, target):
        retired = temporary.with_name(f"{temporary.name}.old")
        descriptor = os.open(target, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                _lock(descriptor)
            os.rename(target, retired)
            try:
                os.rename(temporary, target)
            except OSError:
                os.rename(retired, target)
                raise
        finally:
            os.close(descriptor)
        temporary = retired
    shutil.rmtree(temporary)


def _exchange_names(first: Path, second: Path) -> bool:
    """Linux's exchange of two names; false where there is none (other systems, some network file systems)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if rename(_AT_WORKING_FOLDER, names[0], _AT_WORKING_FOLDER, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def recover(target: Path) -> None:
    """Takes back a replacement of ``target`` that was killed between its two renames; see ``take_place``."""
    for retired in target.parent.glob(f".{glob.escape(target.name)}.*.old"):
        with _unless_in_use(retired) as abandoned:
            if abandoned and target.exists():
                shutil.rmtree(retired, ignore_errors=True)
            elif abandoned:
                os.rename(retired, target)


def sync(path: Path) -> None:
    """Waits until a file, or a folder with everything in it, is on the disk and would survive a power cut."""
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
        _sync_folder(path)
    elif path.is_file():
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    # Not every system lets a folder be opened or synced; then there is nothing to wait for.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room: of Python, or of the libraries that write files by themselves."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in one step."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
