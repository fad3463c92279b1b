"""What the benches share: ratios with their spread, waiting for the device, and handing the result out."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from prunetune.core.files import write_json


def spread(ratios: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(ratios, n=4)
    return {"median": round(median(ratios), 4), "low": round(low, 4), "high": round(high, 4)}


def settle() -> None:
    """Waits until the device has done what it was asked, so that a clock reads right."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(result: Any, out: Path | None) -> None:
    """Prints the result, and writes it to ``out`` if one was named."""
    print(json.dumps(result, indent=2))
    if out:
        write_json(out, result)
