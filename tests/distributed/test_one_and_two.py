"""The one launch of two processes that the fast tier can afford: a whole run under DDP is the run of one process."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.test_two_processes import launch, require_as_in_one


def test_two_processes_decide_and_compute_what_one_does(tmp_path: Path) -> None:
    first, second = launch(2, tmp_path / "two")
    [alone] = launch(1, tmp_path / "one", rows=4)
    assert first["engine"] == "MULTI_CPU", "what accelerate calls a MULTI_GPU launch on CPUs"
    assert first["backend"] == "gloo"
    assert first["processes"] == second["processes"] == 2
    assert alone["processes"] == 1
    assert first["plan"] == second["plan"] == alone["plan"] is not None
    require_as_in_one(tmp_path / "two", tmp_path / "one")
