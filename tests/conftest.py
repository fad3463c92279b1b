"""Being here, beside __init__.py, makes ``tests.support`` importable however pytest is started."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's commands are one test of minutes: begun last, it would keep one core busy and the others idle."""
    items.sort(key=lambda item: item.path.parent.name != "docs")
