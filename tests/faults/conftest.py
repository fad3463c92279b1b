"""One zygote and one set of whole jobs for all tests of faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Whole, Zygote, whole_jobs, zygote
from tests.train.conftest import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def server() -> Iterator[Zygote]:
    """The process that runs jobs in forks of itself."""
    with zygote() as process:
        yield process


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs' model, rows and whole results are."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def wholes(server: Zygote, root: Path) -> dict[str, Whole]:
    """Every job without a fault."""
    return whole_jobs(server, root)
