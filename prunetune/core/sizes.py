"""Reading and writing amounts: percentages, parameter counts, bytes. Inside the code a fraction is in [0, 1]."""

from __future__ import annotations

import math
import re

_COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
# The exponent is how Python and YAML write small and large floats.
_AMOUNT = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z%]*)\s*$", re.IGNORECASE)


def _split(text: str | int | float, wanted: str) -> tuple[float, str]:
    match = _AMOUNT.match(str(text))
    if not match or math.isinf(float(match.group(1))):
        raise ValueError(f"{text!r} is not {wanted}")
    return float(match.group(1)), match.group(2).lower()


def parse_fraction(text: str | int | float) -> float:
    """``"60%"`` or ``0.6`` as 0.6. A bare number above 1 is refused: 60 could mean 60% or a slip."""
    wanted = "a fraction; write 60% or 0.6"
    value, unit = _split(text, wanted)
    if unit == "%":
        return value / 100
    if unit:
        raise ValueError(f"{text!r} is not {wanted}")
    if value > 1:
        raise ValueError(f"{text!r} is not a fraction; write {text}% or a number between 0 and 1")
    return value


def parse_count(text: str | int | float) -> int:
    """``"90M"`` as 90_000_000; K, M and B are powers of ten."""
    wanted = "a count; write for example 90M or 1.2B"
    value, unit = _split(text, wanted)
    if unit not in _COUNT:
        raise ValueError(f"{text!r} is not {wanted}")
    return round(value * _COUNT[unit])


def parse_bytes(text: str | int | float) -> int:
    """``"180MB"`` as 180_000_000; MB and GB are powers of ten, MiB and GiB of two."""
    wanted = "a size; write for example 180MB or 1.5GiB"
    value, unit = _split(text, wanted)
    if unit not in _BYTES:
        raise ValueError(f"{text!r} is not {wanted}")
    return round(value * _BYTES[unit])


def format_fraction(fraction: float) -> str:
    """0.5969 as ``59.7%``."""
    return f"{100 * fraction:.1f}%"


def format_count(count: float) -> str:
    """134515008 as ``134.5M``."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if abs(count) >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"


def format_bytes(size_bytes: float) -> str:
    """269030016 as ``269.0 MB``."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if abs(size_bytes) >= size:
            return f"{size_bytes / size:.1f} {unit}"
    return f"{size_bytes:.0f} B"
