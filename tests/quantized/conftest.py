"""Runs are compared to the bit here, so they run in one thread like the training tests."""

from tests.train.conftest import one_thread, quick_collections

__all__ = ["one_thread", "quick_collections"]
