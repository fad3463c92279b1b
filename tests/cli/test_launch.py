"""`prunetune train --launch`: which command it runs, and what it refuses before any process starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from prunetune.cli import launching
from prunetune.cli.main import app
from prunetune.config.engines import launch_settings
from tests.support import tiny_folder, tiny_rows, write_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of a tiny model."""
    tiny_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", tiny_rows(40))
    values = {
        "model": {"name": str(tmp_path / "model"), "dtype": "float32"},
        "target": {"kept": "60%", "align": 8},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "train": {"max_steps": 4, "batch_size": 2, "max_length": 32, "bf16": False},
        "evaluate": {"enabled": False},
        "folder": str(tmp_path / "run"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*arguments: str) -> Any:
    """The command line in this process; its output on one line."""
    result = CliRunner().invoke(app, ["train", *arguments])
    return result.exit_code, " ".join((result.output + (result.stderr if result.stderr_bytes else "")).split())


def test_launcher_gets_the_engines_file_and_the_same_command(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Child:
        def __init__(self, command: list[str], env: dict[str, str]):
            at = command.index("--config_file") + 1
            seen.update(command=command, env=env, settings=yaml.safe_load(Path(command[at]).read_text()))

        def wait(self) -> int:
            return 7

    monkeypatch.setattr(launching.subprocess, "Popen", Child)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    code, _ = run(str(config), "train.max_steps=3", "--resume", "--launch", "ddp", "--processes", "3")
    assert code == 7, "the launcher's exit code is the command's"
    assert seen["settings"] == launch_settings("ddp", 3, cpu=True)
    command = seen["command"]
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[command.index("--module") :] == [
        *("--module", "prunetune", "train", str(config), "train.max_steps=3", "--resume")
    ]
    assert seen["env"]["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--launch", "zero4"], "there is no engine 'zero4' to launch; did you mean"),
        (["--launch", "single"], "there is no engine 'single' to launch"),
        (["--launch", "fsdp2"], "runs fsdp2 on GPUs only, and there is none; launch one of ddp, zero2, zero3"),
        (["--processes", "2"], "give both"),
    ],
)
def test_what_cannot_be_launched_is_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    code, output = run(str(config), *arguments)
    assert code == 2
    assert said in output.replace("│ ", "")
    assert not (config.parent / "run").exists()


def test_missing_package_is_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    code, output = run(str(config), "--launch", "zero2")
    assert code == 2
    assert "zero2 needs deepspeed: pip install 'prunetune[deepspeed]'" in output


def test_faults_of_the_configuration_come_before_any_process(config: Path) -> None:
    code, output = run(str(config), "train.max_stepz=3", "--launch", "ddp")
    assert code == 2
    assert "max_stepz" in output


@pytest.mark.slow  # two processes of torch, twice
def test_a_launched_run_that_is_preempted_asks_for_a_requeue(config: Path) -> None:
    """A scheduler signals the one process that it started; the launched ones save and stop."""
    command = [sys.executable, "-m", "prunetune", "train", str(config), "train.max_steps=60", "train.save_every=30"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    metrics = config.parent / "run" / "metrics.jsonl"
    with subprocess.Popen([*command, "--launch", "ddp"], env=environment, stderr=subprocess.PIPE, text=True) as started:
        deadline = time.monotonic() + 200
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        started.send_signal(signal.SIGTERM)
        said = started.communicate(timeout=200)[1]
    assert started.returncode == 75, said[-3000:]
    assert "everything is saved" in " ".join(said.split())
    [last] = [int(line) for line in re.findall(r"stopped at step (\d+) of 60", said)]
    assert (config.parent / "run" / "train" / f"checkpoint-{last}" / "prunetune.json").is_file()
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on from step {last} " in done.stdout


@pytest.mark.slow  # two processes of torch, the export and its check in a third
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_launched_run_leaves_a_verified_model(config: Path, engine: str) -> None:
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "prunetune", "train", str(config), "--launch", engine, "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "verified in a fresh process" in done.stdout
    assert (config.parent / "run" / "compact" / "model.safetensors").exists()
