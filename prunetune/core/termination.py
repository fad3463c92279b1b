"""SIGTERM outside of training: a scheduler wants the machine back, and what is finished stays."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from prunetune.core.errors import TerminatedError

# EX_TEMPFAIL of sysexits.h: the same command, started again, goes on.
REQUEUE_EXIT_CODE = 75


@contextlib.contextmanager
def terminable(advice: str) -> Iterator[None]:
    """Turns SIGTERM into TerminatedError at once, so that the block's cleaning up is done.

    Args:
        advice: how to go on.

    Training has a handler of its own, which first finishes its step and saves.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def stop(number: int, frame: Any) -> None:
        raise TerminatedError(f"terminated; {advice}")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
