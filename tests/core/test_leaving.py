"""A process of a launch ends with its own exit code even where C++ would abort it on the way out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

# What libc calls when the interpreter has been taken down: as when a thread of a library is left behind.
ABORTED = """
import ctypes
from prunetune.core.leaving import with_own_exit_code
libc = ctypes.CDLL(None)
with with_own_exit_code():
    import atexit
    atexit.register(print, "handled")
    libc.__cxa_atexit(libc.abort, None, None)
    print("done")
    {ending}
"""


def ended(ending: str, processes: int) -> subprocess.CompletedProcess[str]:
    code = ABORTED.format(ending=ending)
    environment = {**os.environ, "WORLD_SIZE": str(processes)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("ending", "code"),
    [("pass", 0), ("raise SystemExit(75)", 75), ("raise SystemExit('why')", 1), ("raise ValueError('why')", 1)],
)
def test_one_of_several_processes_keeps_its_exit_code_and_runs_pythons_exit_handlers(ending: str, code: int) -> None:
    done = ended(ending, processes=2)
    assert done.returncode == code
    assert done.stdout == "done\nhandled\n"
    assert ("why" in done.stderr) == ("why" in ending)


def test_a_process_alone_is_left_as_it_is() -> None:
    assert ended("pass", processes=1).returncode == -signal.SIGABRT
