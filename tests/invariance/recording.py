"""What the gates of a run saw, step by step."""

from __future__ import annotations

from typing import Any

import pytest

from prunetune.model.gates import GateStatistics
from prunetune.train.joint import JointSearch


def record_statistics(monkeypatch: pytest.MonkeyPatch) -> list[GateStatistics]:
    """Collects the reduced gate statistics of every step from now on."""
    seen: list[GateStatistics] = []
    original = JointSearch.end_step

    def end_step(self: JointSearch, step: int, reduce: Any) -> dict[str, float]:
        def keep(statistics: GateStatistics) -> GateStatistics:
            seen.append(reduce(statistics))
            return seen[-1]

        return original(self, step, keep)

    monkeypatch.setattr(JointSearch, "end_step", end_step)
    return seen


def require_close(left: list[GateStatistics], right: list[GateStatistics]) -> None:
    """Asserts that two runs' gate statistics are equal up to float32 rounding, and that they say something."""
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        for part_a, part_b in ((a.grad, b.grad), (a.square, b.square)):
            assert part_a.keys() == part_b.keys()
            # Within a closed layer everything is zero, but not everywhere.
            assert sum(bool(value.any()) for value in part_a.values()) > len(part_a) // 3
            for name, value in part_a.items():
                off = float((value - part_b[name]).abs().max())
                assert off <= 2e-4 * float(value.abs().max()) + 1e-9, f"{name} is off by {off:.1e}"
