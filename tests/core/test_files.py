"""Nothing half-written is ever in place: errors, crashes and kill -9 leave what was there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from prunetune.core.files import free_bytes, new_folder, read_json, sha256, write_json, write_text


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
    assert names(target) == ["new.txt"], "the next run is not in the way of the remains"


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
