"""Where and in which precision to evaluate, if nobody says."""

from __future__ import annotations

from pathlib import Path

import torch


def default_device() -> str:
    """``cuda`` if there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """``bfloat16`` where the hardware multiplies it fast, else ``float32``.

    On a CPU this asks for the instructions (AVX512-BF16, AMX, Arm BF16) rather than for torch's support:
    without them torch emulates bfloat16, slower than float32.
    """
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if cpu_has_bf16(_cpu_flags()) else "float32"


def cpu_has_bf16(flags: set[str]) -> bool:
    """Whether a CPU with these /proc/cpuinfo flags has bfloat16 dot products."""
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((set(line.split()) for line in lines if line.lower().startswith(("flags", "features"))), set())
