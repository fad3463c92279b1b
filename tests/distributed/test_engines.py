"""One run under every engine: the same losses, gradient norms, gates, plan and weights as in one process.

All of it on CPUs over gloo. ZeRO is DeepSpeed's own; FSDP2 is torch's through accelerate, which has to be told that the
processes are on accelerators (fsdp_on_cpu.py).
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prunetune.config.engines import launch_settings
from prunetune.core.files import read_json
from tests.distributed.test_two_processes import DDP, LIMIT_S, ROOT, free_port, launch, saved
from tests.train.joint_runs import FREEZE_STEP, STEPS, checkpoints, known_model

pytestmark = pytest.mark.slow  # starting two processes of torch takes longer than what they do

Run = tuple[Path, list[dict[str, Any]]]

# How a run is spread or fed -> what its script is asked for.
KINDS: dict[str, dict[str, Any]] = {
    "2 x ddp": {"engine": "ddp"},
    "2 x zero2": {"engine": "zero2"},
    "2 x zero3": {"engine": "zero3"},
    "2 x fsdp2": {"engine": "ddp", "fsdp": True},
    "2 x zero3, accumulated": {"engine": "zero3", "rows": 1, "accumulate": 2},
    "2 x fsdp2, recomputed": {"engine": "ddp", "fsdp": True, "args": {"activation_checkpointing": True}},
    "2 x zero2, recomputed": {"engine": "zero2", "args": {"activation_checkpointing": True}},
    "accumulated": {"rows": 1, "accumulate": 4},
    "recomputed": {"rows": 4, "args": {"activation_checkpointing": True}},
    "padding-free": {"rows": 4, "args": {"padding_free": True, "max_length": None}},
}
GOT = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def launch_file(folder: Path, engine: str) -> Path:
    """accelerate's file for two processes on a CPU; ZeRO-3 also spreads the tiny weights that it would keep whole."""
    settings = launch_settings(engine, 2, cpu=True)
    if engine == "zero3":
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        sizes = (
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "train_batch_size",
        )
        deepspeed = {"zero_optimization": zero, **dict.fromkeys(sizes, "auto")}
        (folder / "zero3.json").write_text(json.dumps(deepspeed))
        settings["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero3.json"), "zero3_init_flag": True}
        del settings["mixed_precision"]
    path = folder / f"{engine}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@functools.cache
def compile_communication() -> None:
    """DeepSpeed compiles its communication for CPUs when it first runs, which takes minutes on a busy machine."""
    code = "from deepspeed.accelerator import get_accelerator as g; g().create_op_builder('ShareMemCommBuilder').load()"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": path}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=500)


def start(out: Path, engine: str | None = None, **asked: Any) -> list[dict[str, Any]]:
    """A run in two processes of an engine, or in one; ``script`` and what it is asked for."""
    if engine is None:
        return launch(1, out, **asked)
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
        compile_communication()
    out.mkdir(exist_ok=True)
    return launch(2, out, config=launch_file(out.parent, engine), **asked)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The reference: one process, four rows a step."""
    out = tmp_path_factory.mktemp("alone")
    return out, start(out, rows=4)


def require_same_trajectory(found: list[dict[str, Any]], out: Path, wanted: Run) -> None:
    """Bounds on the largest difference of any step, and on how much more the last steps differ than the first."""
    [reference] = wanted[1]
    gates = torch.load(wanted[0] / "gates0.pt")
    for rank, process in enumerate(found):
        assert process["step"] == STEPS
        assert process["plan"] == reference["plan"] is not None
        assert process["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert process["grad_norms"] == pytest.approx(reference["grad_norms"], rel=1e-4)
        drift = [abs(a - b) / b for a, b in zip(process["losses"], reference["losses"], strict=True)]
        assert max(drift[-2:]) <= max(drift[:2]) + 2e-6
        own = torch.load(out / f"gates{rank}.pt")
        assert len(own) == len(gates) == FREEZE_STEP
        for step, (a, b) in enumerate(zip(own, gates, strict=True)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=f"gates of step {step}")
        weights, reached = saved(out, rank), saved(wanted[0])
        assert weights.keys() == reached.keys()
        for name, weight in reached.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_takes_the_steps_of_one_process(kind: str, alone: Run, tmp_path: Path) -> None:
    asked = dict(KINDS[kind])
    engine = asked.pop("engine", None)
    found = start(tmp_path / "run", engine, **asked)
    got = "FSDP" if asked.get("fsdp") else GOT.get(str(engine), "NO")
    assert {process["engine"] for process in found} == {got}
    assert {process["processes"] for process in found} == {2 if engine else 1}
    assert {process["backend"] for process in found} == {"gloo" if engine else ""}
    require_same_trajectory(found, tmp_path / "run", alone)


@pytest.mark.parametrize("kind", ["2 x ddp", "2 x zero2", "2 x zero3", "2 x fsdp2"])
def test_every_engine_settles_on_the_shape_that_one_process_does(kind: str, tmp_path: Path) -> None:
    """With a model that knows the rows: the trial's losses are too near to guessing otherwise."""
    file = str(tmp_path / "known.pt")
    torch.save(known_model().state_dict(), file)
    [reference] = start(tmp_path / "alone", rows=4, weights=file)
    wanted = read_json(tmp_path / "alone" / "shape_trial.json")
    assert wanted["settled"] is not None
    found = start(tmp_path / "run", **KINDS[kind], weights=file)
    tried = read_json(tmp_path / "run" / "shape_trial.json")
    assert tried["settled"] == wanted["settled"]
    assert tried["shapes"] == pytest.approx(wanted["shapes"], rel=1e-5)
    assert {process["plan"] for process in found} == {reference["plan"]}


@pytest.mark.parametrize(
    ("step", "asked"),
    [
        (2, {"engine": "zero3"}),
        (6, {"engine": "zero2"}),
        (6, {"engine": "ddp", "fsdp": True}),
        (2, {"engine": "ddp", "fsdp": True}),
    ],
    ids=["zero3 before the freeze", "zero2 after it", "fsdp2 after it", "fsdp2 before it"],
)
def test_a_run_of_one_process_goes_on_under_another_engine(
    step: int, asked: dict[str, Any], alone: Run, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(alone[0], out)
    cut_back(out, step)
    found = start(out, resume=True, **asked)
    require_reached(found, out, alone)


def test_a_run_under_zero3_goes_on_in_one_process(alone: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    start(out, "zero3")
    cut_back(out, 2)
    files = {path.name for path in (out / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.safetensors"} <= files
    assert not [name for name in files if "global_step" in name or name == "latest"], "nothing of DeepSpeed's own"
    require_reached(start(out, rows=4, resume=True), out, alone)


def cut_back(out: Path, step: int) -> None:
    """Leaves what the run had after ``step`` steps."""
    for later in checkpoints(out):
        if later > step:
            shutil.rmtree(out / f"checkpoint-{later}")
    if step <= FREEZE_STEP:
        shutil.rmtree(out / "freeze")


def require_reached(found: list[dict[str, Any]], out: Path, wanted: Run) -> None:
    """The resumed run ended where the reference did."""
    for process in found:
        assert process["step"] == STEPS
        assert process["plan"] == wanted[1][0]["plan"]
        assert process["losses"] == pytest.approx(wanted[1][0]["losses"], rel=1e-5)
    for name, weight in saved(wanted[0]).items():
        torch.testing.assert_close(saved(out)[name], weight, rtol=1e-3, atol=2e-5, msg=name)


def test_when_one_process_is_killed_the_others_stop_and_say_so(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DDP), "--num_processes", "2"),
        *("--main_process_port", str(free_port()), "--module", "tests.distributed.joint_script"),
        json.dumps({"out": str(tmp_path), "die": 4}),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode != 0
    assert time.monotonic() - began < LIMIT_S / 2
    assert "process 0 stops in step 4: another one of this run is gone" in done.stderr
    assert checkpoints(tmp_path) == [2], "what was written before is there to go on from"


def test_fsdp_that_became_ddp_is_refused(tmp_path: Path) -> None:
    """accelerate does that to an FSDP launch with use_cpu, without a word."""
    environment = {**os.environ, "ACCELERATE_USE_FSDP": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.distributed.joint_script", json.dumps({"out": str(tmp_path)})]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode != 0
    assert "the launch asked for FSDP, but accelerate made it single" in done.stderr


def test_two_machines_train_one_run(alone: Run, tmp_path: Path) -> None:
    """Two launchers on the loopback device, one process each."""
    out, port = tmp_path / "run", str(free_port())
    out.mkdir()
    config = tmp_path / "multinode.yaml"
    shipped = yaml.safe_load((ROOT / "configs" / "accelerate" / "multinode.yaml").read_text())
    config.write_text(yaml.safe_dump({**shipped, "use_cpu": True}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    machines = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
                *("--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port),
                *("--module", "tests.distributed.joint_script", json.dumps({"out": str(out)})),
            ],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for machine in machines:
        _, said = machine.communicate(timeout=LIMIT_S)
        assert machine.returncode == 0, said[-3000:]
    found = [json.loads((out / f"process{rank}.json").read_text()) for rank in (0, 1)]
    assert [process["processes"] for process in found] == [2, 2]
    require_same_trajectory(found, out, alone)
