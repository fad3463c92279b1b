"""Faults that are not kills: a full disk, damaged files, a second process, a scheduler's SIGTERM, a clock set back."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from prunetune.core.errors import DataError
from prunetune.core.lock import only_one
from prunetune.core.termination import REQUEUE_EXIT_CODE
from prunetune.train.checkpoint import MARKER, damage, find_checkpoint, newest, read_marker, rotate, write_marker
from tests.faults.harness import Whole, Zygote
from tests.faults.jobs import outcome


def slow(*values: object) -> object:
    """A case for the slow tier."""
    return pytest.param(*values, marks=pytest.mark.slow)


def copy(root: Path, tmp_path: Path) -> Path:
    """The finished run with all its checkpoints, to be spoilt."""
    shutil.copytree(root / "whole" / "kept", tmp_path / "run")
    return tmp_path / "run"


def log(folder: Path) -> str:
    """What a job said, in one line."""
    return " ".join(folder.with_suffix(".log").read_text().split())


def flip(path: Path, place: float = 0.7) -> None:
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Cuts the file short."""
    path.write_bytes(path.read_bytes()[:-7])


# ---- damaged files


@pytest.mark.parametrize("spoil", [flip, truncate])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json", MARKER, "rng_state.pth"]
)
def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    root: Path, wholes: dict[str, Whole], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, spoil: object
) -> None:
    train = copy(root, tmp_path) / "train"
    assert newest(train, train / "freeze") == train / "checkpoint-6"
    assert not capsys.readouterr().out
    spoil(train / "checkpoint-6" / name)  # type: ignore[operator]
    assert newest(train, train / "freeze") == train / "checkpoint-4"
    said = " ".join(capsys.readouterr().out.split())
    assert f"is damaged and passed over: {name} changed after it was written" in said
    with pytest.raises(DataError, match=r"is damaged: .* changed|is not a complete checkpoint"):
        find_checkpoint(str(train / "checkpoint-6"), train, train / "freeze", plain=False)


def test_run_goes_on_from_before_a_damaged_checkpoint_and_a_damaged_freeze(
    server: Zygote, root: Path, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    folder = copy(root, tmp_path)
    flip(folder / "train" / "checkpoint-6" / "adapter_model.safetensors")
    flip(folder / "train" / "freeze" / "updates.safetensors", 0.99)
    assert server.serve("kept", root, folder)["status"] == 0, log(folder)
    assert "freeze is damaged and passed over: updates.safetensors" in log(folder)
    assert "going on from step 3" in log(folder)
    assert outcome("kept", folder) == wholes["kept"].outcome


def test_marker_that_was_tampered_with_is_damage(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    write_marker(tmp_path, {"train_tokens": 100})
    facts = json.loads((tmp_path / MARKER).read_text())
    assert read_marker(tmp_path) == facts
    assert not damage(tmp_path)
    (tmp_path / MARKER).write_text(json.dumps(facts | {"train_tokens": 101}))
    assert damage(tmp_path) == [MARKER]


# ---- a full disk


@pytest.mark.parametrize(
    ("path", "limit", "said"),
    [
        ("checkpoint-4", 20_000, "could not be written and was removed"),
        slow("checkpoint-2", 9000, "could not be written and was removed; no checkpoint had been written yet"),
        slow(".freeze.", 9000, "the disk is full"),
        slow(".compact.", 30_000, "the disk is full"),
        slow("figures", 9000, "the disk is full"),
    ],
)
def test_full_disk_is_said_and_costs_nothing(
    server: Zygote, root: Path, wholes: dict[str, Whole], tmp_path: Path, path: str, limit: int, said: str
) -> None:
    folder = tmp_path / "run"
    answer = server.serve("command", root, folder, {"path": path, "bytes": limit, "full": True})
    assert (answer["signal"], answer["status"]) == (0, 1), log(folder)
    assert said in log(folder)
    assert "Traceback" not in log(folder)
    assert server.serve("command", root, folder)["status"] == 0, log(folder)
    assert outcome("command", folder) == wholes["command"].outcome


# ---- two at once, and a scheduler


def test_second_process_in_the_same_folder_is_refused(
    server: Zygote, root: Path, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    folder = copy(root, tmp_path)
    for job, place in (("command", "run"), ("command", "run/train"), ("merge", "run/merged")):
        with only_one(tmp_path / place):
            answer = server.serve(job, root, folder)
        assert answer["status"] == 1
        assert f"{place} is in use: process {os.getpid()} on" in log(folder)


@pytest.mark.parametrize(
    ("path", "said"),
    [("checkpoint-2", "stopped at step"), slow(".compact.", "terminated; the same command with --resume")],
)
def test_sigterm_saves_and_asks_for_a_requeue(
    server: Zygote, root: Path, wholes: dict[str, Whole], tmp_path: Path, path: str, said: str
) -> None:
    folder = tmp_path / "run"
    answer = server.serve("command", root, folder, {"path": path, "signal": signal.SIGTERM})
    assert (answer["signal"], answer["status"]) == (0, REQUEUE_EXIT_CODE), log(folder)
    assert said in log(folder)
    assert server.serve("command", root, folder)["status"] == 0, log(folder)
    assert outcome("command", folder) == wholes["command"].outcome


# ---- the clock


def test_rotation_goes_by_steps_and_not_by_the_clock(tmp_path: Path) -> None:
    for step, written in ((2, 900), (4, 500), (6, 100), (10, 2000)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (written, written))
    rotate(tmp_path, 2, 6, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"], "10 is of a former run"
    rotate(tmp_path, 1, 6, str(tmp_path / "checkpoint-4"))
    rotate(tmp_path, None, 6, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"], "the best one stays"


@pytest.mark.slow
def test_clock_that_goes_back_and_another_place_change_nothing(
    server: Zygote, root: Path, wholes: dict[str, Whole], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert server.serve("kept", root, folder, {"clock": "back"})["status"] == 0, log(folder)
    assert outcome("kept", folder) == wholes["kept"].outcome
