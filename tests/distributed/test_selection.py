"""Two processes on a CPU (gloo) choose the rows and tokens that one process chooses, and learn the same from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_two_processes import launch as launch_script
from tests.distributed.test_two_processes import saved
from tests.train.joint_runs import checkpoints, require_same
from tests.train.selecting_runs import decisions, kept_ids

pytestmark = pytest.mark.slow  # starting two processes of torch takes longer than what they do

Q_TUNING = {"method": "q_tuning", "kept": "50%"}
NEIGHBOURS = {"method": "neighbour_perplexity", "kept": "70%"}


def launch(processes: int, out: Path, **asked: Any) -> list[dict[str, Any]]:
    """Runs selection_script.py in so many processes; what each of them saw."""
    return launch_script(processes, out, script="tests.distributed.selection_script", **asked)


@pytest.mark.parametrize(
    "asked",
    [
        {"samples": Q_TUNING, "tokens": NEIGHBOURS, "joint": True},
        {"samples": Q_TUNING, "accumulate": 2, "rescore_after": 3},
        {"samples": "infobatch"},
    ],
    ids=["joint", "accumulated, with a table", "infobatch"],
)
def test_two_processes_choose_and_learn_what_one_does(tmp_path: Path, asked: dict[str, Any]) -> None:
    first, second = launch(2, tmp_path / "two", rows=2, **asked)
    [alone] = launch(1, tmp_path / "one", rows=4, **asked)
    assert first["processes"] == second["processes"] == 2
    assert kept_ids(tmp_path / "two") == kept_ids(tmp_path / "one")
    assert len(decisions(tmp_path / "two")) == 8, "written once"
    assert first["plan"] == second["plan"] == alone["plan"]
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert len(first["micro_batches"]) == len(second["micro_batches"])
    require_same(saved(tmp_path / "two", 0), saved(tmp_path / "two", 1))
    for name, weight in saved(tmp_path / "one").items():
        torch.testing.assert_close(saved(tmp_path / "two")[name], weight, rtol=1e-3, atol=2e-3, msg=name)


def test_kept_rows_are_dealt_out_evenly(tmp_path: Path) -> None:
    """The longest rows are kept, wherever they were: both processes train on as many."""
    lengths = [8 + 7 * (i * 5 % 24) // 4 for i in range(24)]
    asked = {"samples": {"method": "length", "kept": "50%"}, "lengths": lengths, "accumulate": 2, "steps": 3}
    first, second = launch(2, tmp_path / "two", rows=2, **asked)
    # Four of eight rows: one micro-batch of two on each process instead of two.
    assert first["micro_batches"] == second["micro_batches"] == [2, 2, 2]


def test_process_without_a_row_does_not_hang(tmp_path: Path) -> None:
    asked = {"samples": {"method": "loss", "kept": "1%"}, "steps": 3}
    first, second = launch(2, tmp_path / "two", rows=2, **asked)
    [alone] = launch(1, tmp_path / "one", rows=4, **asked)
    assert first["step"] == second["step"] == 3
    assert all(line["rows"] == [1, 4] for line in decisions(tmp_path / "two"))
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    require_same(saved(tmp_path / "two", 0), saved(tmp_path / "two", 1))


@pytest.mark.parametrize("samples", [Q_TUNING, "infobatch"], ids=["table", "infobatch"])
def test_resumed_in_two_processes_equals_uninterrupted(tmp_path: Path, samples: Any) -> None:
    asked = {"samples": samples, "joint": True} | ({"rescore_after": 3} if samples == Q_TUNING else {})
    launch(2, tmp_path / "two", rows=2, **asked)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "two", copy)
    for later in [later for later in checkpoints(copy) if later > 2]:
        shutil.rmtree(copy / f"checkpoint-{later}")
    shutil.rmtree(copy / "freeze")
    launch(2, copy, rows=2, resume=True, **asked)
    assert decisions(copy) == decisions(tmp_path / "two")
    for rank in (0, 1):
        require_same(saved(copy, rank), saved(tmp_path / "two"))
