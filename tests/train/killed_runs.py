"""A process that runs tiny joint runs in forks of itself and kills them: ``python -m tests.train.killed_runs``.

Reads one JSON case a line ({"out": folder, "kill": name or null, "delay": seconds or null}), runs it in a fork, and
answers with a line {"signal": number it died of, 0 if none, "seconds": how long it ran}. Forking saves the imports.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from prunetune.core import files
from prunetune.train import freeze, freezing, guarded, moments, trainer
from prunetune.train.callbacks import MetricsFile
from tests.train.joint_runs import joint_trainer, prune_config, rows

SETTINGS: dict[str, Any] = {
    "prune": prune_config(compensation={"method": "refit", "tokens": 256}),
    "eval_dataset": rows(6, seed=9),
    "evaluate_at_freeze": True,
    "args": {"save_total_limit": 1, "disable_tqdm": True},
}


def die(*_: Any, **__: Any) -> Any:
    """SIGKILL: nothing is flushed, no finally runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def nth(number: int, then: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose ``number``-th call is ``then`` instead."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (then if calls == number else otherwise)(*args, **kwargs)

    return call


def half_written(value: Any, path: Any, *_: Any, **__: Any) -> None:
    """Writes some bytes where the file should go, then dies."""
    with open(path, "wb") as file:
        file.write(b"half")
        file.flush()
    die()


def half_a_line(self: MetricsFile, args: Any, state: Any, control: Any, **_: Any) -> None:
    """Dies in the middle of a line of metrics.jsonl."""
    with open(self._path, "a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    die()


def arm(kill: str) -> None:
    """Puts the blow where ``kill`` says."""
    step = trainer.JointTrainer.training_step
    if kill.startswith("step "):
        trainer.JointTrainer.training_step = nth(int(kill[5:]), die, step)  # type: ignore[method-assign]
    elif kill == "optimizer of the first checkpoint":
        moments.save_file = nth(1, half_written, moments.save_file)
    elif kill == "optimizer of a search checkpoint":
        moments.save_file = nth(2, half_written, moments.save_file)
    elif kill == "marker of a checkpoint":
        guarded.write_marker = nth(2, die, guarded.write_marker)
    elif kill == "rotation":
        guarded.rotate = nth(3, die, guarded.rotate)
    elif kill == "before the freeze":
        trainer.JointTrainer._freeze = die  # type: ignore[method-assign]
    elif kill == "after the validation before the cut":
        trainer.JointTrainer.cut = die  # type: ignore[method-assign]
    elif kill == "weights of the freeze":
        freeze.save_file = nth(2, half_written, freeze.save_file)
    elif kill == "sliced optimizer":
        moments.Moments.sliced = die  # type: ignore[method-assign]
    elif kill == "rename of the freeze":
        files.os = Renamer()  # type: ignore[assignment]
    elif kill == "after the freeze":
        freezing.load_updates = die
    elif kill == "metrics line":
        MetricsFile.on_log = nth(8, half_a_line, MetricsFile.on_log)  # type: ignore[method-assign]
    else:
        raise ValueError(kill)


class Renamer:
    """``os`` whose rename kills."""

    rename = staticmethod(die)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class Started(TrainerCallback):
    """Leaves a file when training has begun."""

    def __init__(self, out: Path):
        self._out = out

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (self._out / "started").touch()


def run(case: dict[str, Any]) -> None:
    """The run itself, in the fork."""
    torch.set_num_threads(1)
    out = Path(case["out"])
    if case["kill"]:
        arm(case["kill"])
    made = joint_trainer(out, **SETTINGS, callbacks=[Started(out)])
    try:
        made.train()
    except KeyboardInterrupt as stopped:
        (out / "stopped").write_text(str(stopped))
    torch.save({name: p.detach() for name, p in made.model.named_parameters()}, out / "weights.pt")


def fork(case: dict[str, Any]) -> dict[str, Any]:
    """Runs a case in a fork; with a delay, sends it ``signal`` so long after training began."""
    out = Path(case["out"])
    out.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(out / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run(case)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    began = time.monotonic()
    if case.get("delay") is not None:
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while not (out / "started").exists() and os.waitid(os.P_PID, child, ended) is None:
            time.sleep(0.005)
        began = time.monotonic()
        time.sleep(case["delay"])
        os.kill(child, case["signal"])  # not reaped yet, so it is still there
    _, status = os.waitpid(child, 0)
    died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"signal": died, "status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)
