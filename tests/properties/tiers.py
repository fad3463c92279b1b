"""How many cases a property is tried on: a few by default, thousands in the slow tier; always the same ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

FEW, MANY = 25, 1100
SLOW_ENOUGH = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example]


def tiers(*properties: Callable[..., Any]) -> Any:
    """Parametrises a test by property and number of cases."""
    cases = [(each, FEW) for each in properties]
    slow = [pytest.param(each, MANY, marks=pytest.mark.slow) for each in properties]
    names = [each.__name__ for each in properties]
    return pytest.mark.parametrize(
        ("holds", "cases"), [*cases, *slow], ids=[f"{name}-{tier}" for tier in ("few", "many") for name in names]
    )


def run(holds: Callable[..., Any], cases: int, *arguments: Any) -> None:
    """Tries a property on ``cases`` cases."""
    profile = settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=SLOW_ENOUGH
    )
    profile(holds)(*arguments)
