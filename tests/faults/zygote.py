"""A process that has imported everything, runs jobs in forks of itself and kills them.

Started as ``python -m tests.faults.zygote``. Reads a JSON case a line, ``{"job", "root", "folder", "kill"}``, and
answers with a JSON line: ``signal`` (0: ended by itself), ``status``, ``seconds``, ``writes`` (file operations inside
the folder), ``at`` (the last of them).

``kill`` is null or one of {"write": n} (before the n-th file operation; or {"path": text}, the first whose path has
the text), {"write": n, "bytes": b} (from there on in the
middle of the first file that grows beyond b bytes: the kernel ends the process inside the write call, whoever
writes), {"seconds": s} (whatever it does then). With {"signal": number} something milder than SIGKILL is sent; with
{"full": true} nobody is killed, but no file grows beyond b bytes, as on a disk that is full. {"clock": "back"} only
turns the clock.
"""

from __future__ import annotations

import contextlib
import json
import locale
import mmap
import os
import resource
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401 - the report's figures, imported once for all jobs
import torch

from tests.faults.jobs import JOBS

# Operations on files that the interpreter announces; the first argument is the path.
_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Board:
    """A page that the fork and its parent share: operations so far, and the path of the last one."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, 4096)
        self._number = 0

    def write(self, path: str) -> int:
        """Notes an operation; returns its number, from 1."""
        self._number += 1
        text = path.encode(errors="replace")[:4000]
        self._page[: 8 + len(text)] = struct.pack("<II", self._number, len(text)) + text
        return self._number

    def read(self) -> tuple[int, str]:
        """Number and path of the last operation."""
        number, length = struct.unpack("<II", self._page[:8])
        return number, self._page[8 : 8 + length].decode(errors="replace")


def watch(folder: Path, kill: dict[str, Any], board: Board) -> None:
    """Counts file operations inside ``folder`` from now on, and strikes at the one that ``kill`` names."""
    inside = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & _WRITING:
                return
        elif event not in _EVENTS:
            return
        try:
            path = os.fsdecode(arguments[0])
        except TypeError:
            return  # a file descriptor
        if inside not in os.path.abspath(path):
            return
        number = board.write(os.path.relpath(path, inside))
        if number == kill.get("write") or kill.get("path", "\0") in path:
            kill.pop("path", None)
            if "bytes" in kill:
                if not kill.get("full"):
                    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (kill["bytes"], kill["bytes"]))
            else:
                os.kill(os.getpid(), kill.get("signal", signal.SIGKILL))

    sys.addaudithook(hook)


def set_back() -> None:
    """A clock that runs backwards, in a place far away where fractions are written with commas."""
    began, real = time.time(), time.time
    time.time = lambda: began - 3600 * (real() - began)
    os.environ["TZ"] = "Pacific/Kiritimati"
    time.tzset()
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C"):
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, name)
            break


def child(case: dict[str, Any], board: Board) -> None:
    """The job itself, in the fork; never returns."""
    folder, status = Path(case["folder"]), 1
    try:
        torch.set_num_threads(1)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if (case["kill"] or {}).get("clock"):
            set_back()
        watch(folder, case["kill"] or {}, board)
        JOBS[case["job"]](Path(case["root"]), folder)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        # Not sys.exit: the zygote's own exit handlers and buffers are not the fork's.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(case: dict[str, Any]) -> dict[str, Any]:
    """Runs a case in a fork and says how it ended."""
    kill, board, began = case["kill"] or {}, Board(), time.monotonic()
    process = os.fork()
    if process == 0:
        child(case, board)
    if "seconds" in kill:
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() - began < kill["seconds"] and os.waitid(os.P_PID, process, ended) is None:
            time.sleep(0.002)
        os.kill(process, kill.get("signal", signal.SIGKILL))  # not reaped yet, so it is still this process
    _, status = os.waitpid(process, 0)
    writes, at = board.read()
    return {
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "status": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - began,
        "writes": writes,
        "at": at,
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
