"""What `prunetune doctor` looks at: each finding says what is there and, if that is not enough, what to do."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import psutil

from prunetune.core.files import free_bytes
from prunetune.core.sizes import format_bytes

_OPTIONAL = {
    "bitsandbytes": "model.quantize: bases in 4 and 8 bit",
    "gguf": "reads GGUF base models, the quickstart's among them",
    "wandb": "train.report_to: [wandb]",
    "tensorboard": "train.report_to: [tensorboard]",
}
_LEAST_MEMORY_BYTES = 6 * 10**9
_LEAST_DISK_BYTES = 5 * 10**9


class Level(IntEnum):
    """How serious a finding is."""

    ok = 0
    warn = 1
    fail = 2


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    level: Level
    name: str
    found: str
    advice: str = ""


def diagnose() -> Iterator[Finding]:
    """All findings, the quick ones first; the arithmetic check takes about two seconds."""
    yield _python()
    yield from _packages()
    yield _optional()
    yield _cores()
    yield _memory()
    yield _disk()
    if importable("torch"):
        yield from _devices()
        yield _bf16()
        yield _matmul()


def importable(name: str) -> bool:
    """Whether a distribution is installed."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding(Level.ok, "python", f"{found} ({sys.executable})")


def _packages() -> Iterator[Finding]:
    """Each required package against the versions that prunetune was written for."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("prunetune") or []
    except metadata.PackageNotFoundError:
        yield Finding(Level.warn, "prunetune", "not installed, runs from its folder", "pip install -e .")
        return
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        range_ = str(wanted.specifier)
        if not importable(wanted.name):
            yield Finding(Level.fail, wanted.name, "not installed", f"pip install '{wanted.name}{range_}'")
            continue
        version = metadata.version(wanted.name)
        if wanted.specifier.contains(version, prereleases=True):
            yield Finding(Level.ok, wanted.name, version)
        else:
            advice = f"pip install '{wanted.name}{range_}'; other versions are untested and may fail"
            yield Finding(Level.warn, wanted.name, f"{version}, not {range_}", advice)


def _optional() -> Finding:
    have = [f"{name} {metadata.version(name)}" for name in _OPTIONAL if importable(name)]
    lack = [f"{name} ({use})" for name, use in _OPTIONAL.items() if not importable(name)]
    text = f"installed: {', '.join(have) or 'none'}; not installed: {', '.join(lack) or 'none'}"
    return Finding(Level.ok, "optional", text)


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) < usable:
        text = f"{usable}, but OMP_NUM_THREADS={threads}"
        return Finding(Level.warn, "cores", text, "unset OMP_NUM_THREADS to use all of them")
    return Finding(Level.ok, "cores", str(usable))


def _memory() -> Finding:
    available = psutil.virtual_memory().available
    limit = _container_limit()
    if limit is not None:
        available = min(available, limit - psutil.Process().memory_info().rss)
    text = f"{format_bytes(available)} free of {format_bytes(psutil.virtual_memory().total)}"
    if available < _LEAST_MEMORY_BYTES:
        advice = "the quickstart wants 6 GB; lower train.batch_size, raise train.accumulate"
        return Finding(Level.warn, "memory", text, advice)
    return Finding(Level.ok, "memory", text)


def _container_limit() -> int | None:
    """Bytes that the control group allows; None if it sets no limit."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _disk() -> Finding:
    free = free_bytes(Path.cwd())
    text = f"{format_bytes(free)} free at {Path.cwd()}"
    if free < _LEAST_DISK_BYTES:
        return Finding(Level.warn, "disk", text, "make room, or set folder: to another disk")
    return Finding(Level.ok, "disk", text)


def _devices() -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count()
    for index in range(count):
        facts = torch.cuda.get_device_properties(index)
        text = f"{facts.name}, {format_bytes(facts.total_memory)}, compute {facts.major}.{facts.minor}"
        yield Finding(Level.ok, f"gpu {index}", text)
    if not count:
        text = "none that torch can use; everything runs on the CPU"
        if Path("/dev/nvidia0").exists():
            advice = f"torch {torch.__version__} does not see the NVIDIA GPU: install a CUDA build of torch"
            yield Finding(Level.warn, "gpu", text, advice)
        else:
            yield Finding(Level.ok, "gpu", text)
    if count > 1:
        yield Finding(Level.ok, "several gpus", f"accelerate launch --num_processes {count} scripts/train.py CONFIG")


def _bf16() -> Finding:
    import torch

    if torch.cuda.is_available():
        if torch.cuda.get_device_capability() >= (8, 0):
            return Finding(Level.ok, "bfloat16", "in the GPU's hardware")
        return Finding(Level.warn, "bfloat16", "emulated on this GPU", "set train.bf16=false")
    flags = _cpu_flags()
    units = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    if units:
        return Finding(Level.ok, "bfloat16", f"in the CPU's hardware ({', '.join(units)})")
    return Finding(Level.warn, "bfloat16", "emulated on this CPU, often slower", "try train.bf16=false")


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _matmul() -> Finding:
    """Speed of a matrix product in both dtypes, and whether they agree: a broken library shows here."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    speeds, results = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(1024, 1024, generator=generator).to(device, dtype) for _ in range(2))
        results[dtype] = (a @ b).float()
        calls, start = 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < 1.0:
            result = a @ b
            result[0, 0].item()  # waits for a GPU
            calls += 1
        speeds[dtype] = 2 * 1024**3 * calls / seconds / 1e9
    single, half = speeds[torch.float32], speeds[torch.bfloat16]
    text = f"{single:.0f} GFLOP/s in float32, {half:.0f} in bfloat16, on the {device}"
    difference = (results[torch.float32] - results[torch.bfloat16]).norm() / results[torch.float32].norm()
    if not difference < 0.02:
        return Finding(Level.fail, "matmul", text + ", results differ", "reinstall torch; do not train here")
    if half < single:
        return Finding(Level.warn, "matmul", text, "set train.bf16=false: float32 is faster here")
    return Finding(Level.ok, "matmul", text)
