"""One at a time in a folder: the second one is told by whom it is held, and a killed holder holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prunetune.core.errors import FolderInUseError
from prunetune.core.lock import lock_path, only_one

HOLD = """
import sys
from pathlib import Path
from prunetune.core.lock import only_one
with only_one(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_refused_by_name_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(FolderInUseError, match=rf"run is in use: process {holder.pid} on .* \(since"),
        only_one(tmp_path / "run"),
    ):
        pytest.fail("the block must not run")
    with only_one(tmp_path / "other"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert lock_path(tmp_path / "run").exists(), "a killed holder leaves its file"
    with only_one(tmp_path / "run"):
        assert str(os.getpid()) in lock_path(tmp_path / "run").read_text()
    assert not list(tmp_path.iterdir()), "and the next one clears it away"


def test_the_same_process_is_refused_too_and_errors_release(tmp_path: Path) -> None:
    with pytest.raises(ValueError), only_one(tmp_path / "run"):  # noqa: PT012
        with pytest.raises(FolderInUseError), only_one(tmp_path / "run"):
            pass
        raise ValueError
    with only_one(tmp_path / "run"):
        pass


def test_a_lock_file_that_says_nothing_is_no_obstacle(tmp_path: Path) -> None:
    lock_path(tmp_path / "run").write_bytes(b"\xff garbage")
    with only_one(tmp_path / "run"), pytest.raises(FolderInUseError), only_one(tmp_path / "run"):
        pass
