"""One thread: tiny matrices are no faster with more, and child processes then compute the same bits."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sets torch to one thread for the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def quick_collections() -> None:
    """Keeps the libraries out of the full collections that accelerate asks for at the start of every run."""
    gc.collect()
    gc.freeze()
