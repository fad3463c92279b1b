"""Two processes on a CPU (gloo) and one process make the same decision from the same rows."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.core.files import read_json
from tests.train.joint_runs import checkpoints, metrics, require_same, timeless

ROOT = Path(__file__).parents[2]
DDP = ROOT / "configs" / "accelerate" / "ddp.yaml"
LIMIT_S = 240

pytestmark = pytest.mark.slow  # starting two processes of torch takes longer than what they do


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    processes: int, out: Path, script: str = "tests.distributed.joint_script", config: Path = DDP, **asked: Any
) -> list[dict[str, Any]]:
    """Runs a script in so many processes of an engine's launch file; what each of them saw."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", script]
    if processes > 1:
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
            *("--num_processes", str(processes), "--main_process_port", str(free_port())),
            *("--module", script),
        ]
    # DeepSpeed looks for the ninja beside the interpreter, and compiles again for any other one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "PATH": path}
    done = subprocess.run(
        [*command, json.dumps({"out": str(out), **asked})],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"process{rank}.json").read_text()) for rank in range(processes)]


def saved(out: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """The weights that a process ended with."""
    found: dict[str, torch.Tensor] = torch.load(out / f"weights{rank}.pt")
    return found


def require_as_in_one(two: Path, one: Path) -> None:
    """Two processes ended alike, bit for bit, and where one process with all the rows did."""
    first, second, alone = (
        json.loads(file.read_text())["losses"]
        for file in (two / "process0.json", two / "process1.json", one / "process0.json")
    )
    assert first == second
    assert first == pytest.approx(alone, rel=1e-5)
    require_same(saved(two, 0), saved(two, 1))
    for name, weight in saved(one).items():
        torch.testing.assert_close(saved(two)[name], weight, rtol=1e-3, atol=2e-5, msg=name)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run in two processes with two rows each."""
    out = tmp_path_factory.mktemp("two")
    return out, launch(2, out)


@pytest.mark.parametrize("mask", ["lora_gradient", "atp", "hard_concrete"])
def test_masks_that_read_adapters_and_distillation_decide_alike(tmp_path: Path, mask: str) -> None:
    first, second = launch(2, tmp_path / "two", mask=mask, distill=0.5)
    [alone] = launch(1, tmp_path / "one", rows=4, mask=mask, distill=0.5)
    assert first["plan"] == second["plan"] == alone["plan"] is not None
    require_as_in_one(tmp_path / "two", tmp_path / "one")


def test_hidden_gates_and_the_maps_of_pat_learn_as_in_one_process(tmp_path: Path) -> None:
    asked = {"mask": "pat", "units": ["hidden"]}
    first, second = launch(2, tmp_path / "two", **asked)
    [alone] = launch(1, tmp_path / "one", rows=4, **asked)
    assert first["plan"] == second["plan"] == alone["plan"] is not None
    require_as_in_one(tmp_path / "two", tmp_path / "one")


def test_metrics_are_written_once(two: tuple[Path, list[dict[str, Any]]]) -> None:
    entries = metrics(two[0])
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 9))
    assert sum("eval_after_cut_loss" in entry for entry in entries) == 1


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_in_two_processes_equals_uninterrupted(
    two: tuple[Path, list[dict[str, Any]]], tmp_path: Path, step: int
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(two[0], copy)
    for later in checkpoints(copy):
        if later > step:
            shutil.rmtree(copy / f"checkpoint-{later}")
    if step <= 4:
        shutil.rmtree(copy / "freeze")
    first, second = launch(2, copy, resume=True)
    assert first["plan"] == second["plan"] == two[1][0]["plan"]
    for rank in (0, 1):
        require_same(saved(copy, rank), saved(two[0]))
    assert timeless(metrics(copy)) == timeless(metrics(two[0]))


def test_ctrl_c_on_one_process_stops_all_after_the_same_step(
    two: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first, second = launch(2, out, interrupt=3)
    assert first["step"] == second["step"] == 3
    assert first["said"].startswith("KeyboardInterrupt: stopped at step 3 of 8")
    assert second["said"].startswith("KeyboardInterrupt")
    launch(2, out, resume=True)
    require_same(saved(out), saved(two[0]))


def test_nan_on_one_process_stops_all(tmp_path: Path) -> None:
    first, second = launch(2, tmp_path / "run", nan=3)
    for process in (first, second):
        assert process["step"] == 2
        assert "in step 3" in process["said"]
        assert process["said"].startswith("DivergedError")
    assert all(bool(torch.isfinite(weight).all()) for weight in saved(tmp_path / "run", 0).values())


def test_calibration_with_fewer_batches_than_processes_does_not_hang(tmp_path: Path) -> None:
    """Two rows are one batch: the second process has no calibration row of its own."""
    first, second = launch(2, tmp_path / "run", data=2)
    assert first["plan"] == second["plan"] is not None


def test_a_trial_of_shapes_with_fewer_rows_than_processes(tmp_path: Path) -> None:
    """A single row: the second process has none to try shapes on."""
    first, second = launch(2, tmp_path / "run", data=1)
    assert first["plan"] == second["plan"] is not None
    assert read_json(tmp_path / "run" / "shape_trial.json")["targets"] > 0
