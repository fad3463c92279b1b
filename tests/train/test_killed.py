"""Runs that are killed by the operating system at bad moments, and then go on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.train.checkpoint import newest
from tests.train.joint_runs import checkpoints, joint_trainer, metrics, require_same, timeless, weights
from tests.train.killed_runs import SETTINGS

Ask = Callable[..., dict[str, Any]]

POINTS = {
    # where the blow falls: step of the checkpoint that the run goes on from, 0 for none
    "step 2": 0,
    "step 4": 2,
    "step 5": 4,
    "step 8": 6,
    "optimizer of the first checkpoint": 0,
    "optimizer of a search checkpoint": 2,
    "marker of a checkpoint": 2,
    "rotation": 6,
    "before the freeze": 4,
    "after the validation before the cut": 4,
    "weights of the freeze": 4,
    "sliced optimizer": 4,
    "rename of the freeze": 4,
    "after the freeze": 4,
    "metrics line": 4,
}


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Runs a case in another process; see killed_runs.py."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.train.killed_runs"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=root,
        env=environment,
        text=True,
    )
    assert server.stdin
    assert server.stdout

    def run(out: Path, kill: str | None = None, delay: float | None = None, number: int = 0) -> dict[str, Any]:
        case = {"out": str(out), "kill": kill, "delay": delay, "signal": number}
        server.stdin.write(json.dumps(case) + "\n")  # type: ignore[union-attr]
        server.stdin.flush()  # type: ignore[union-attr]
        answer: dict[str, Any] = json.loads(server.stdout.readline())  # type: ignore[union-attr]
        return answer

    yield run
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture(scope="module")
def whole(ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that was never killed, and how long it took."""
    out = tmp_path_factory.mktemp("whole")
    answer = ask(out)
    assert answer["status"] == 0, (out / "log").read_text()
    return out, answer["seconds"]


def require_resumes(out: Path, whole: Path) -> None:
    """Goes on in ``out`` and ends with the weights and metrics of the run that was never killed."""
    resumed = joint_trainer(out, **SETTINGS)
    resumed.train(resume_from_checkpoint=newest(out, out / "freeze") is not None)
    require_same(weights(resumed), torch.load(whole / "weights.pt"))
    assert timeless(metrics(out)) == timeless(metrics(whole))
    assert checkpoints(out)[-1] == 8
    assert not list(out.glob(".*")), "nothing is left of what was torn"


@pytest.mark.parametrize("kill", POINTS)
def test_killed_run_goes_on_as_if_it_had_not_been(
    ask: Ask, whole: tuple[Path, float], tmp_path: Path, kill: str
) -> None:
    out = tmp_path / "run"
    answer = ask(out, kill)
    assert answer["signal"] == signal.SIGKILL, (out / "log").read_text()
    found = newest(out, out / "freeze")
    assert (int(json.loads((found / "trainer_state.json").read_text())["global_step"]) if found else 0) == POINTS[kill]
    assert (out / "freeze").exists() == (kill in ("step 5", "step 8", "rotation", "after the freeze", "metrics line"))
    require_resumes(out, whole[0])


@pytest.mark.parametrize("number", range(3))
def test_run_killed_at_a_random_moment_goes_on(
    ask: Ask, whole: tuple[Path, float], tmp_path: Path, number: int
) -> None:
    delay = random.Random(number).uniform(0, whole[1] * 0.7)
    out = tmp_path / "run"
    answer = ask(out, None, delay, signal.SIGKILL)
    assert answer["signal"] == signal.SIGKILL or answer["status"] == 0, (out / "log").read_text()
    require_resumes(out, whole[0])


def test_ctrl_c_saves_and_says_how_to_go_on(ask: Ask, whole: tuple[Path, float], tmp_path: Path) -> None:
    out = tmp_path / "run"
    answer = ask(out, None, 0.0, signal.SIGINT)
    assert answer["status"] == 0, (out / "log").read_text()
    said = (out / "stopped").read_text()
    assert said.startswith("stopped at step ")
    assert "resume_from_checkpoint=True" in said
    step = int(said.split()[3])
    found = newest(out, out / "freeze")
    assert found is not None
    assert int(json.loads((found / "trainer_state.json").read_text())["global_step"]) == step
    require_resumes(out, whole[0])
