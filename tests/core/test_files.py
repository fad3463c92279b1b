"""Nothing half-written is ever in place: errors, crashes and kill -9 leave what was there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from prunetune.core import files
from prunetune.core.files import (
    disk_is_full,
    free_bytes,
    new_file,
    new_folder,
    read_json,
    recover,
    sha256,
    sweep,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def old_folder(tmp_path):
    old = tmp_path / "out"
    old.mkdir()
    (old / "old.txt").write_text("old")
    return old


def test_the_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_folder(target) as folder:
        (folder / "a.txt").write_text("a")
        assert not target.exists()
        assert folder.parent == target.parent, "a rename must not cross disks"
    assert (target / "a.txt").read_text() == "a"
    assert names(target.parent) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [True, False])
def test_an_error_inside_leaves_what_was_there(tmp_path, existed, error):
    target = old_folder(tmp_path) if existed else tmp_path / "out"
    with pytest.raises(error), new_folder(target, replace=True) as folder:  # noqa: PT012
        (folder / "half.txt").write_text("half")
        raise error
    assert names(tmp_path) == (["out"] if existed else [])
    if existed:
        assert (target / "old.txt").read_text() == "old"


def test_an_existing_folder_is_refused_unless_it_may_be_replaced(tmp_path):
    target = old_folder(tmp_path)
    with pytest.raises(FileExistsError, match="out exists"), new_folder(target):
        pytest.fail("the block must not run")
    assert names(target) == ["old.txt"]
    with new_folder(target, replace=True) as folder:
        (folder / "new.txt").write_text("new")
        assert names(target) == ["old.txt"], "the old one stays until the new one is whole"
    assert names(target) == ["new.txt"]
    assert names(tmp_path) == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(FileExistsError), new_folder(target) as folder:  # noqa: PT012
        (folder / "new.txt").write_text("new")
        old_folder(tmp_path)
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    target, rename, calls = old_folder(tmp_path), os.rename, []

    def failing(source, destination):
        calls.append(source)
        if len(calls) == 2:  # the old one has made room, the new one is about to take it
            raise OSError("disk gone")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    monkeypatch.setattr(files, "_exchange_names", lambda *_: False)
    with pytest.raises(OSError, match="disk gone"), new_folder(target, replace=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["out"]


KILLED = """
import sys, time
from pathlib import Path
from prunetune.core.files import new_folder
with new_folder(Path(sys.argv[1]), replace=True) as folder:
    (folder / "half.txt").write_text("half")
    print("inside", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("existed", [True, False])
def test_kill_9_leaves_only_a_partial_folder_beside(tmp_path, existed):
    target = old_folder(tmp_path) if existed else tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "inside\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = [name for name in names(tmp_path) if name != "out"]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    assert left[0].endswith(".partial")
    assert target.exists() == existed
    if existed:
        assert names(target) == ["old.txt"]
    with new_folder(target, replace=True) as folder:
        (folder / "new.txt").write_text("new")
    assert names(target) == ["new.txt"]
    assert names(tmp_path) == ["out"], "the next writer clears the remains away"


REPLACE = """
import os, signal, sys
from pathlib import Path
from prunetune.core import files

number, atomic = int(sys.argv[2]), sys.argv[3] == "atomic"
if not atomic:
    files._exchange_names = lambda *_: False
calls = 0

def hook(event, arguments):
    global calls
    if event in ("os.rename", "shutil.rmtree"):
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
with files.new_folder(Path(sys.argv[1]), replace=True) as folder:
    (folder / "new.txt").write_text("new")
"""


@pytest.mark.parametrize(("way", "number"), [("atomic", 1), ("atomic", 2), ("two renames", 2), ("two renames", 3)])
def test_kill_inside_a_replacement_leaves_the_old_or_the_new(tmp_path, way, number):
    target = old_folder(tmp_path)
    process = subprocess.run([sys.executable, "-c", REPLACE, str(target), str(number), way])
    assert process.returncode == -signal.SIGKILL
    if way == "atomic":
        assert names(target) == ["new.txt"], "exchanged before the old one is deleted"
    if (way, number) == ("two renames", 2):
        assert not target.exists(), "the window that recover closes"
    recover(target)
    assert names(target) == (["old.txt"] if (way, number) == ("two renames", 2) else ["new.txt"])
    with new_folder(target, replace=True) as folder:
        (folder / "newest.txt").write_text("newest")
    assert names(target) == ["newest.txt"]
    assert names(tmp_path) == ["out"]


def test_a_replacement_under_way_is_not_taken_back_by_others(tmp_path):
    target = old_folder(tmp_path)
    retired = tmp_path / ".out.abc.partial.old"
    target.rename(retired)
    descriptor = os.open(retired, os.O_RDONLY)
    assert files._lock(descriptor)
    recover(target)
    assert not target.exists()
    os.close(descriptor)
    recover(target)
    assert names(target) == ["old.txt"]


def test_work_in_progress_is_not_swept_away(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
        sweep(tmp_path)
        with new_file(tmp_path / "out.txt") as file:
            file.write_text("b")
            sweep(tmp_path)
    assert names(tmp_path) == ["out", "out.txt"]


def test_a_new_file_that_fails_leaves_the_old_one(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ValueError), new_file(tmp_path / "a") as file:  # noqa: PT012
        file.write_text("half")
        raise ValueError
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EFBIG, "x"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "x"), False),
        (ValueError("x"), False),
    ],
)
def test_what_says_that_the_disk_is_full(error, full):
    assert disk_is_full(error) == full


def test_two_writers_at_once_do_not_mix(tmp_path):
    target = tmp_path / "out"
    with new_folder(target, replace=True) as first, new_folder(target, replace=True) as second:
        (first / "1.txt").write_text("1")
        (second / "2.txt").write_text("2")
    assert names(target) == ["1.txt"]
    assert names(tmp_path) == ["out"]


def test_text_and_json_round_trip(tmp_path):
    value = {"ü": [1, 2.5, None], "nested": {"a": "\n"}}
    write_json(tmp_path / "a" / "b.json", value)
    assert read_json(tmp_path / "a" / "b.json") == value
    assert "ü" in (tmp_path / "a" / "b.json").read_text(encoding="utf-8")
    assert names(tmp_path / "a") == ["b.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"step": 0, "filler": "x" * 200_000})
    code = (
        "import sys; from pathlib import Path; from prunetune.core.files import write_json\n"
        "for step in range(150): write_json(Path(sys.argv[1]), {'step': step, 'filler': 'x' * 200_000})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    reads = 0
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        assert len(read_json(path)["filler"]) == 200_000
        reads += 1
    assert process.wait() == 0
    assert reads > 0


def test_digest_and_free_space(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert free_bytes(tmp_path / "not" / "yet" / "there") > 0
