"""What the benches share: ratios with their spread, and waiting for the device."""

from __future__ import annotations

from statistics import median, quantiles

import torch


def spread(ratios: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(ratios, n=4)
    return {"median": round(median(ratios), 4), "low": round(low, 4), "high": round(high, 4)}


def settle() -> None:
    """Waits until the device has done what it was asked, so that a clock reads right."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
