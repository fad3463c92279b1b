"""Starting the processes of a run: accelerate's launcher with a file made from the table of engines."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil
import yaml

from prunetune.config.engines import ENGINES, launch_settings
from prunetune.core.errors import ConfigError, Problem, suggest
from prunetune.core.termination import REQUEUE_EXIT_CODE

# What a run that saved and stopped exits with, by the signal that stopped it.
_STOPPED: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: REQUEUE_EXIT_CODE}
LAUNCHED = tuple(name for name, engine in ENGINES.items() if engine.distributed_type)


def launch(engine: str, processes: int | None, arguments: Sequence[str]) -> int:
    """Runs ``prunetune ARGUMENTS`` in several processes and waits for them.

    Args:
        engine: a name of ENGINES.
        processes: how many; None: one per GPU, or two on a CPU.
        arguments: of the command line, without ``--launch`` and ``--processes``.

    Returns:
        0 only if all processes came to their end; 75 or 130 if they were stopped by SIGTERM or Ctrl-C through this
        process; else the launcher's own code.

    Raises:
        ConfigError: the engine cannot be had here.
    """
    import torch

    gpus = torch.cuda.device_count()
    _require(engine, gpus, processes)
    with tempfile.TemporaryDirectory(prefix="prunetune-launch-") as folder:
        file = Path(folder) / f"{engine}.yaml"
        file.write_text(yaml.safe_dump(launch_settings(engine, processes or gpus or 2, cpu=gpus == 0)))
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
        # Port 0: any that is free, so that two runs on one machine do not meet.
        command = [*launcher, "--main_process_port", "0", "--module", "prunetune", *arguments]
        # DeepSpeed compiles with the ninja that was installed with it, also where nobody activated its environment.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": path} | ({"DS_ACCELERATOR": "cpu"} if gpus == 0 else {})
        return _wait(subprocess.Popen(command, env=environment))


def _require(engine: str, gpus: int, processes: int | None) -> None:
    if engine not in LAUNCHED:
        raise ConfigError(
            [Problem(f"there is no engine {engine!r} to launch; {suggest(engine, LAUNCHED)}", "--launch")]
        )
    facts, found = ENGINES[engine], []
    if "WORLD_SIZE" in os.environ:
        found.append(Problem("this process was launched already; leave --launch out", "--launch"))
    if facts.package and find_spec(facts.package) is None:
        found.append(Problem(f"{engine} needs {facts.package}: pip install 'prunetune[{facts.package}]'", "--launch"))
    if gpus == 0 and not facts.on_cpu:
        others = ", ".join(name for name in LAUNCHED if ENGINES[name].on_cpu)
        why = f"accelerate runs {engine} on GPUs only, and there is none; launch one of {others}"
        found.append(Problem(why, "--launch"))
    if gpus and processes and processes > gpus:
        found.append(Problem(f"{processes} processes need as many GPUs; there are {gpus}", "--processes"))
    if found:
        raise ConfigError(found)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The run's exit code; Ctrl-C and SIGTERM are the business of the processes that train, which save and stop."""
    stopped: list[int] = []

    def forward(number: int, frame: object) -> None:
        stopped.append(number)
        # Ctrl-C on a terminal reaches them by itself.
        if number != signal.SIGINT or not sys.stdin.isatty():
            _pass_on(child.pid, number)

    before = {number: signal.signal(number, forward) for number in _STOPPED}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # torch's launcher says 1 of any process that did not end with 0.
    return _STOPPED[stopped[-1]] if code and stopped else code


def _pass_on(launcher: int, number: int) -> None:
    """Signals the launched processes: the launcher itself would kill them 30 seconds later, saved or not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        workers = psutil.Process(launcher).children()
        for process in workers or [psutil.Process(launcher)]:
            process.send_signal(number)
